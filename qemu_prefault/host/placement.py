# SPDX-License-Identifier: GPL-2.0-or-later
"""Where and how a helper thread is to run: not as the vCPU that it was cloned from.

A vCPU's scheduling policy, priority, affinity and cgroup are meant for the guest. A helper that
keeps a real-time policy takes the vCPU's CPU away; beside a busy real-time vCPU it gets none.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from . import procfs
from .headroom import Mount, cgroup_directories, parse_cgroups, parse_mountinfo
from .procfs import Process, gone, read_optional

CAP_SYS_NICE: Final = 23  # include/uapi/linux/capability.h
NODES: Final = "/sys/devices/system/node"
REAL_TIME: Final = frozenset({os.SCHED_FIFO, os.SCHED_RR, 6})  # 6: SCHED_DEADLINE


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse a list of CPUs or nodes as the kernel prints it: ``0-3,8``."""
    numbers: set[int] = set()
    for first, last in re.findall(r"(\d{1,6})(?:-(\d{1,6}))?", text):
        numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def node_cpus() -> dict[int, frozenset[int]]:
    """Return the CPUs of each NUMA node; none where the kernel knows no nodes."""
    found = {}
    for node in parse_cpu_list(read_optional(f"{NODES}/online") or ""):
        text = read_optional(f"{NODES}/node{node}/cpulist")
        if text is not None:
            found[node] = parse_cpu_list(text)
    return found


def helper_cpus(
    main: frozenset[int],
    vcpu: frozenset[int],
    nodes: Iterable[frozenset[int]],
    real_time: frozenset[int],
) -> list[frozenset[int]]:
    """Return the sets of CPUs on which a helper may run, the best first.

    It is to touch memory on the nodes where its vCPU would, beside QEMU's main thread.

    :param main: the affinity of QEMU's main thread. :param vcpu: of the vCPU's thread.
    :param nodes: the CPUs of each node. :param real_time: CPUs on which real-time threads of
        QEMU run.
    """
    near = frozenset[int]().union(*(cpus for cpus in nodes if cpus & vcpu)) or main
    choices = [near & main, near, main]
    free = [choice - real_time for choice in choices]
    return [choice for choice in dict.fromkeys([free[0], free[1], *choices]) if choice]


def real_time_cpus(process: Process) -> frozenset[int]:
    """Return the CPUs to which real-time threads of a process are bound."""
    bound: set[int] = set()
    for tid in process.threads():
        try:
            if os.sched_getscheduler(tid) & 0xFF in REAL_TIME:
                bound |= os.sched_getaffinity(tid)
        except OSError:  # it has ended
            continue
    return frozenset(bound)


def affinity(tid: int) -> frozenset[int]:
    """Return the CPUs on which a thread may run.

    :raises GoneError: it has ended.
    """
    try:
        return frozenset(os.sched_getaffinity(tid))
    except ProcessLookupError:
        raise gone(tid) from None


def place(process: Process, tid: int, choices: Sequence[frozenset[int]]) -> list[str]:
    """Make a helper an ordinary thread: scheduling class, nice, cgroups, CPUs.

    :param choices: see :func:`helper_cpus`.
    :returns: what was not permitted.
    """
    refused = []
    try:
        if os.sched_getscheduler(tid) != os.SCHED_OTHER:
            os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        refused.append("its scheduling class")
    except OSError:
        return []  # it has ended
    try:
        if os.getpriority(os.PRIO_PROCESS, tid):
            os.setpriority(os.PRIO_PROCESS, tid, 0)
    except PermissionError:
        refused.append("its nice value")
    except OSError:
        return []
    if not leave_cgroups(process, tid):
        refused.append("its cgroup")
    if not _bind(tid, choices):
        refused.append("its CPUs")
    return refused


def _bind(tid: int, choices: Sequence[frozenset[int]]) -> bool:
    for choice in choices:
        try:
            # The kernel takes what its cpuset allows; EINVAL: nothing.
            os.sched_setaffinity(tid, choice)
        except PermissionError:
            return False
        except OSError:
            continue
        return True
    return False


def leave_cgroups(process: Process, tid: int) -> bool:
    """Move a thread to the cgroups of its process's main thread; False if that is not permitted.

    libvirt has each vCPU in a cgroup of its own, with its cpuset and cpu.max.
    """
    task = f"{procfs.PROC}/{process.pid}/task"
    wanted = parse_cgroups(read_optional(f"{task}/{process.pid}/cgroup") or "")
    current = parse_cgroups(read_optional(f"{task}/{tid}/cgroup") or "")
    mounts = parse_mountinfo(read_optional(f"{procfs.PROC}/self/mountinfo") or "")
    done = True
    for file in threads_files(wanted, current, mounts):
        try:
            with open(file, "w") as threads:
                threads.write(str(tid))
        except OSError:
            done = False
    return done


def threads_files(
    wanted: Mapping[str, str], current: Mapping[str, str], mounts: Sequence[Mount]
) -> list[str]:
    """Return the files to which a thread is written to leave its cgroups for others.

    :param wanted: path by controller, as :func:`~.headroom.parse_cgroups` has it.
    """
    files: dict[str, None] = {}
    for controller, path in wanted.items():
        if current.get(controller, path) == path:
            continue
        # "" is that of the v2 hierarchy
        directories = cgroup_directories({controller: path}, mounts, controller or "cgroup.threads")
        if directories:
            directory, unified = directories[0]
            files[f"{directory}/{'cgroup.threads' if unified else 'tasks'}"] = None
    return list(files)


def why_stalled(pid: int, tid: int, seconds: float = 0.05) -> str:
    """Say why a helper thread does not get on, as far as /proc shows."""
    task = f"{procfs.PROC}/{pid}/task/{tid}"
    before = _cpu_time(task)
    time.sleep(seconds)
    stat = read_optional(f"{task}/stat") or ""
    state = stat[stat.rfind(")") + 2 :][:1]
    if state in "Tt" and state:
        return "QEMU is stopped (SIGSTOP, a debugger, a freezer)"
    if state == "R" and _cpu_time(task) == before:
        try:
            cpus = ",".join(map(str, sorted(os.sched_getaffinity(tid))))
        except OSError:
            cpus = "?"
        return f"helper {tid} gets no CPU: other threads keep CPU {cpus} busy"
    if state == "R":
        return f"helper {tid} is busy in the kernel, which takes long for one chunk"
    where = (read_optional(f"{task}/wchan") or "").strip("0 \n")
    return f"helper {tid} waits in the kernel" + (f" ({where})" if where else "")


def _cpu_time(task: str) -> str:
    return (read_optional(f"{task}/schedstat") or "").partition(" ")[0]
