# SPDX-License-Identifier: GPL-2.0-or-later
"""Compute how many additional threads QEMU can start.

QEMU aborts if it cannot start a thread (``qemu_thread_create()``, util/qemu-thread-posix.c).
Therefore qemu-prefault limits the number of helpers, so that QEMU can still start its own threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from . import proc_files
from .headroom import cgroup_directories, parse_cgroups, parse_mountinfo
from .proc_files import parse_number, read_optional
from .procfs import Process, Status

#: The link of the initial user namespace: PROC_USER_INIT_INO (include/linux/proc_ns.h).
INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"
CAP_SYS_ADMIN: Final = 21  # include/uapi/linux/capability.h
CAP_SYS_RESOURCE: Final = 24

#: Number of tasks that helpers leave for QEMU. This is the maximum size of QEMU's thread pool
#: (util/thread-pool.c).
RESERVE: Final = 64
#: Minimum number of available tasks that is necessary to start a helper.
MIN_LEFT: Final = 4


@dataclass(frozen=True, slots=True)
class TaskLimit:
    """A limit on QEMU's tasks or pending signals.

    A helper uses one task, and one pending signal for its timer.

    :ivar name: The name of the limit, for messages.
    :ivar left: The number of tasks or pending signals that the limit still allows.
    :ivar detail: The value and the current use of the limit, for messages.
    """

    name: str
    left: int
    detail: str

    def helpers(self, wanted: int) -> int:
        """Return the number of helpers that this limit allows, at most ``wanted``."""
        if self.left < MIN_LEFT:
            return 0
        return max(1, min(wanted, self.left - RESERVE))


def task_limits(process: Process) -> list[TaskLimit]:
    """Return all limits that apply to a new QEMU thread."""
    return [
        *pids_limits(
            read_optional(f"{process.proc}/cgroup") or "",
            read_optional(f"{proc_files.PROC}/self/mountinfo") or "",
        ),
        *_rlimits(process),
        *_host_limits(
            read_optional(f"{proc_files.PROC}/loadavg") or "",
            {
                name: parse_number(read_optional(f"{proc_files.PROC}/sys/kernel/{name}"))
                for name in ("threads-max", "pid_max")
            },
        ),
    ]


def strictest(limits: Sequence[TaskLimit], wanted: int) -> tuple[int, TaskLimit | None]:
    """Return the number of helpers that all limits allow, and the strictest limit.

    The limit is None if all limits allow ``wanted`` helpers.
    """
    allowed, by = wanted, None
    for limit in limits:
        helpers = limit.helpers(wanted)
        if helpers < allowed:
            allowed, by = helpers, limit
    return allowed, by


def pids_limits(cgroup: str, mountinfo: str) -> list[TaskLimit]:
    """Return the limits of the pids controller in a cgroup and its ancestors.

    :param cgroup: The text of ``/proc/PID/cgroup``.
    :param mountinfo: The text of ``/proc/self/mountinfo``.
    """
    limits = []
    directories = cgroup_directories(parse_cgroups(cgroup), parse_mountinfo(mountinfo), "pids")
    for directory, _ in directories:
        most = parse_number(read_optional(f"{directory}/pids.max"))
        used = parse_number(read_optional(f"{directory}/pids.current"))
        if most is not None and used is not None:
            limits.append(
                TaskLimit(f"pids.max of {directory}", max(0, most - used), f"{most}, {used} in use")
            )
    return limits


def parse_limits(text: str) -> dict[str, int]:
    """Return the soft limits in the text of ``/proc/PID/limits``, by name.

    The result omits ``unlimited`` limits.
    """
    limits = {}
    for line in text.split("\n"):  # "%-25s %-20lu ": proc_pid_limits(), fs/proc/base.c
        value = parse_number(line[26:47])
        if value is not None:
            limits[line[:26].rstrip()] = value
    return limits


def parse_pending(status: str) -> tuple[int, int] | None:
    """Return the number of pending signals, and the limit on this number.

    The result is None if the text contains no ``SigQ`` field.

    :param status: The text of ``/proc/PID/status``.
    """
    match = re.search(r"^SigQ:\s+(\d{1,19})/(\d{1,20})$", status, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def _rlimits(process: Process) -> list[TaskLimit]:
    limits = []
    status = process.status()
    text = read_optional(f"{process.proc}/status") or ""
    if pending := parse_pending(text):
        used, most = pending
        limits.append(
            TaskLimit(
                "the limit on pending signals (ulimit -i)",
                max(0, most - used),
                f"{most}, {used} in use",
            )
        )
    most_tasks = parse_limits(read_optional(f"{process.proc}/limits") or "").get("Max processes")
    if most_tasks is not None and not _is_exempt(process, status):
        used = tasks_of_user(status.uids[0])
        limits.append(
            TaskLimit(
                f"the task limit of user {status.uids[0]} (ulimit -u)",
                max(0, most_tasks - used),
                f"{most_tasks}, {used} in use",
            )
        )
    return limits


def _is_exempt(process: Process, status: Status) -> bool:
    """Return whether the limit on a user's tasks does not apply to a process.

    copy_process() (kernel/fork.c) exempts root, and processes with one of two capabilities, in the
    initial user namespace. In another user namespace, root is another user of the host, and a
    capability has no effect here.
    """
    if status.uids[0] == 0 and _is_in_initial_user_namespace(f"{proc_files.PROC}/self"):
        return True
    return _is_in_initial_user_namespace(process.proc) and any(
        status.has_capability(number) for number in (CAP_SYS_RESOURCE, CAP_SYS_ADMIN)
    )


def _is_in_initial_user_namespace(proc: str) -> bool:
    try:
        return os.readlink(f"{proc}/ns/user") == INITIAL_USER_NAMESPACE
    except OSError:
        return False


def tasks_of_user(uid: int) -> int:
    """Return the number of threads of all processes with this real user id."""
    count = 0
    for name in os.listdir(proc_files.PROC):
        if name.isdecimal():
            text = read_optional(f"{proc_files.PROC}/{name}/status") or ""
            user = re.search(r"^Uid:\s+(\d+)\s", text, re.MULTILINE)
            threads = re.search(r"^Threads:\s+(\d{1,9})$", text, re.MULTILINE)
            if user and threads and int(user[1]) == uid:
                count += int(threads[1])
    return count


def _host_limits(loadavg: str, most: dict[str, int | None]) -> list[TaskLimit]:
    # loadavg_proc_show(), fs/proc/loadavg.c: "0.00 0.00 0.00 RUNNING/ALL LAST"
    match = re.search(r" \d+/(\d{1,9}) \d+$", loadavg.strip())
    if match is None:
        return []
    used = int(match[1])
    return [
        TaskLimit(f"kernel.{name}", max(0, limit - used), f"{limit}, {used} in use")
        for name, limit in most.items()
        if limit is not None
    ]
