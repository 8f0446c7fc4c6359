# SPDX-License-Identifier: GPL-2.0-or-later
"""Compute how many helper threads QEMU's limits allow.

QEMU aborts if it cannot start a thread (``qemu_thread_create()``, util/qemu-thread-posix.c), or if
it cannot map a stack. Therefore qemu-prefault limits the number of helpers, so that QEMU can still
start its own threads and map their stacks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..units import PAGE_SIZE
from . import proc_files
from .headroom import cgroup_directories, parse_cgroups, parse_key_values, parse_mountinfo
from .proc_files import parse_number, read_optional
from .procfs import Process, Status

#: The link of the initial user namespace: PROC_USER_INIT_INO (include/linux/proc_ns.h).
INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"
CAP_SYS_ADMIN: Final = 21  # include/uapi/linux/capability.h
CAP_SYS_RESOURCE: Final = 24
CAP_IPC_LOCK: Final = 14

#: Number of threads that helpers leave for QEMU. This is the maximum size of QEMU's thread pool
#: (util/thread-pool.c).
RESERVE: Final = 64
#: Number of threads that must be possible, including one helper, to start a helper.
MIN_LEFT: Final = 4
#: Mappings of a helper: its code, and its control page and stack.
HELPER_MAPPINGS: Final = 2
#: Mappings of a new QEMU thread: its stack and the guard page, and malloc's new arena, of which a
#: part is not accessible yet.
THREAD_MAPPINGS: Final = 4
#: Maximum size of a helper's mappings in bytes.
HELPER_BYTES: Final = 64 << 10
#: The size of a thread's stack in glibc if ``ulimit -s`` is unlimited (ARCH_STACK_DEFAULT_SIZE).
DEFAULT_STACK: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class TaskLimit:
    """A limit that helpers and QEMU's own threads use up.

    :ivar name: The name of the limit, for messages.
    :ivar left: The amount that the limit still allows.
    :ivar detail: The value and the current use of the limit, for messages.
    :ivar cost: The amount that one helper uses: one task, or one pending signal for its timer.
    :ivar thread_cost: The amount that one new thread of QEMU uses.
    :ivar what: What QEMU can still do, for messages.
    :ivar remedy: How to raise the limit. The default is derived from ``name``.
    """

    name: str
    left: int
    detail: str
    cost: int = 1
    thread_cost: int = 1
    what: str = "start only {} more threads"
    remedy: str = ""

    def helpers(self, wanted: int) -> int:
        """Return the number of helpers that this limit allows, at most ``wanted``.

        The helpers leave :data:`RESERVE` threads for QEMU. If this is not possible, one helper may
        start. If a helper would leave fewer than :data:`MIN_LEFT` - 1 threads, none may start.
        """
        if self.left < self.cost + (MIN_LEFT - 1) * self.thread_cost:
            return 0
        return max(1, min(wanted, (self.left - RESERVE * self.thread_cost) // self.cost))

    def cause(self, pid: int) -> str:
        """Return the text of an error, if this limit allows no helper."""
        shown = self.what.format(self.left if self.thread_cost < PAGE_SIZE else _size(self.left))
        return f"QEMU (pid {pid}) can {shown}, because {self.name} is {self.detail}"


def _size(size: int) -> str:
    return f"{size >> 10} KiB"


def task_limits(process: Process) -> list[TaskLimit]:
    """Return all limits that apply to a new QEMU thread."""
    return [
        *pids_limits(
            read_optional(f"{process.proc}/cgroup") or "",
            read_optional(f"{proc_files.PROC}/self/mountinfo") or "",
        ),
        *_rlimits(process),
        *mapping_limits(process),
        *address_limits(
            parse_limits(read_optional(f"{process.proc}/limits") or ""),
            parse_key_values(read_optional(f"{process.proc}/status") or ""),
            process.pid,
            locks=_locks_new_memory(process),
        ),
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


def mapping_limits(process: Process) -> list[TaskLimit]:
    """Return the limit on the number of QEMU's mappings.

    If the limit is reached, mmap() fails (``do_mmap()``, mm/mmap.c).
    """
    most = parse_number(read_optional(f"{proc_files.PROC}/sys/vm/max_map_count"))
    if most is None:
        return []
    used = process.read_content("maps").count(b"\n")
    return [
        TaskLimit(
            "vm.max_map_count",
            max(0, most - used),
            f"{most}, {used} in use",
            cost=HELPER_MAPPINGS,
            thread_cost=THREAD_MAPPINGS,
            what="create only {} more mappings",
            remedy=f"sysctl vm.max_map_count={2 * most}",
        )
    ]


def address_limits(
    limits: Mapping[str, int], status: Mapping[str, int], pid: int, *, locks: bool
) -> list[TaskLimit]:
    """Return QEMU's limits on the size of its mappings.

    A new thread needs a stack, whose size QEMU's libc takes from ``ulimit -s``.

    :param limits: The result of :func:`parse_limits` for QEMU.
    :param status: The sizes in QEMU's ``/proc/PID/status``, in bytes.
    :param locks: Whether the limit on locked memory applies to new mappings.
    """
    stack = limits.get("Max stack size", DEFAULT_STACK)
    found = []
    for name, field, option, applies in (
        ("Max address space", "VmSize", "as", True),
        ("Max data size", "VmData", "data", True),
        ("Max locked memory", "VmLck", "memlock", locks),
    ):
        if applies and name in limits and field in status:
            found.append(
                TaskLimit(
                    f"QEMU's limit {name!r}",
                    max(0, limits[name] - status[field]),
                    f"{_size(limits[name])}, {_size(status[field])} in use",
                    cost=HELPER_BYTES,
                    thread_cost=max(stack, PAGE_SIZE),
                    what="map only {} more memory for threads",
                    remedy=f"raise QEMU's limit (prlimit --pid {pid} --{option}=unlimited)",
                )
            )
    return found


def _locks_new_memory(process: Process) -> bool:
    """Return whether the limit on locked memory applies to QEMU's new mappings.

    With ``-overcommit mem-lock=on``, QEMU calls mlockall(MCL_CURRENT | MCL_FUTURE), so that all its
    mappings are locked. CAP_IPC_LOCK removes the limit (``mlock_future_ok()``, mm/mmap.c).
    """
    if process.status().has_capability(CAP_IPC_LOCK) and _is_in_initial_user_namespace(
        process.proc
    ):
        return False
    try:
        with open(f"{process.proc}/smaps", "rb", buffering=0) as file:
            # The kernel examines only as many mappings as one read returns. The first one is
            # QEMU's program.
            text = file.read(PAGE_SIZE)
    except OSError:
        return False
    flags = re.search(rb"^VmFlags:(.*)$", text, re.MULTILINE)
    return flags is not None and b"lo" in flags[1].split()


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
