# SPDX-License-Identifier: GPL-2.0-or-later
"""Set a helper thread's scheduling, CPUs and cgroup.

A helper inherits these properties from the thread that starts it, which can be a vCPU's thread.
However, the operator has chosen the properties for the guest and not for helpers. If the helper had
a real-time policy, it would take CPU time from a vCPU. If the helper ran on the CPU of a busy
real-time vCPU, it would get no CPU time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from . import proc_files
from .headroom import Mount, cgroup_directories, parse_cgroups, parse_mountinfo
from .proc_files import gone, parse_number_list, read_optional
from .procfs import Process

CAP_SYS_NICE: Final = 23  # include/uapi/linux/capability.h
MAX_CPUS: Final = 8192  # CONFIG_NR_CPUS, arch/x86/Kconfig
NODES: Final = "/sys/devices/system/node"
REAL_TIME: Final = frozenset({os.SCHED_FIFO, os.SCHED_RR, 6})  # 6: SCHED_DEADLINE


def parse_cpu_list(text: str) -> frozenset[int]:
    """Return the numbers in a list of CPUs or NUMA nodes, such as ``0-3,8``.

    The result is empty if the text has another format.
    """
    return frozenset(parse_number_list(text, MAX_CPUS))


def node_cpus() -> dict[int, frozenset[int]]:
    """Return the CPUs of each NUMA node, by the number of the node.

    The result is empty if the kernel has no NUMA support.
    """
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
    """Return the sets of CPUs on which a helper may run, the best set first.

    The best set contains only CPUs of the NUMA nodes on which the vCPU may run, because the helper
    then allocates memory on these nodes. These CPUs also belong to the affinity of QEMU's main
    thread, and no real-time thread is bound to these CPUs.

    :param main: The affinity of QEMU's main thread.
    :param vcpu: The affinity of the vCPU thread.
    :param nodes: The CPUs of each NUMA node.
    :param real_time: The CPUs to which QEMU's real-time threads are bound.
    """
    near = frozenset[int]().union(*(cpus for cpus in nodes if cpus & vcpu)) or main
    choices = [near & main, near, main]
    free = [choice - real_time for choice in choices]
    return [choice for choice in dict.fromkeys([free[0], free[1], *choices]) if choice]


def real_time_cpus(process: Process) -> frozenset[int]:
    """Return the CPUs to which a process's real-time threads are bound."""
    bound: set[int] = set()
    for tid in process.threads():
        try:
            if os.sched_getscheduler(tid) & 0xFF in REAL_TIME:
                bound |= os.sched_getaffinity(tid)
        except OSError:  # the thread has exited
            continue
    return frozenset(bound)


def affinity(tid: int) -> frozenset[int]:
    """Return the CPUs on which a thread may run.

    :raises GoneError: If the thread has exited.
    """
    try:
        return frozenset(os.sched_getaffinity(tid))
    except ProcessLookupError:
        raise gone(tid) from None


def place(process: Process, tid: int, choices: Sequence[frozenset[int]]) -> list[str]:
    """Set a helper thread's scheduling class, nice value, cgroups and CPUs.

    The new scheduling class is SCHED_OTHER, and the new nice value is 0. The new cgroups are those
    of QEMU's main thread.

    :param choices: The sets of CPUs to try in this order, see :func:`helper_cpus`.
    :returns: The names of the properties that this process is not allowed to change.
    """
    refused = []
    try:
        if os.sched_getscheduler(tid) != os.SCHED_OTHER:
            os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        refused.append("its scheduling class")
    except OSError:
        return []  # the thread has exited
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


@contextmanager
def not_delayed_by_others(tid: int) -> Iterator[None]:
    """Run the calling thread with real-time priority within the block, if permitted.

    A thread of QEMU that is stopped by ptrace waits for the tracer. On a host without idle CPUs, a
    tracer with ordinary scheduling may wait for a CPU much longer than it runs. The priority is at
    least that of the stopped thread.

    :param tid: The id of the thread that the block stops.
    """
    policy, own = os.sched_getscheduler(0), os.sched_getparam(0)
    changed = False
    with suppress(OSError):  # this process lacks CAP_SYS_NICE, or the thread has exited
        priority = max(os.sched_getparam(tid).sched_priority, own.sched_priority, 1)
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        changed = True
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, policy, own)


def _bind(tid: int, choices: Sequence[frozenset[int]]) -> bool:
    for choice in choices:
        try:
            # The kernel intersects the set with the cpuset. If nothing is left, it returns EINVAL.
            os.sched_setaffinity(tid, choice)
        except PermissionError:
            return False
        except OSError:
            continue
        return True
    return False


def leave_cgroups(process: Process, tid: int) -> bool:
    """Move a thread to the cgroups of its process's main thread.

    libvirt puts each vCPU thread into its own cgroup, which has its own cpuset and cpu.max.

    :returns: False if this process has no permission to move the thread, otherwise True.
    """
    task = f"{process.proc}/task"
    wanted = parse_cgroups(read_optional(f"{task}/{process.pid}/cgroup") or "")
    current = parse_cgroups(read_optional(f"{task}/{tid}/cgroup") or "")
    mounts = parse_mountinfo(read_optional(f"{proc_files.PROC}/self/mountinfo") or "")
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
    """Return the files to which to write a thread's id to change its cgroups.

    :param wanted: The new cgroup path of each controller, see :func:`~.headroom.parse_cgroups`.
    :param current: The current cgroup path of each controller.
    :param mounts: The result of :func:`~.headroom.parse_mountinfo` for this process.
    """
    files: dict[str, None] = {}
    for controller, path in wanted.items():
        if current.get(controller, path) == path:
            continue
        # The key of the v2 hierarchy is "".
        directories = cgroup_directories({controller: path}, mounts, controller or "cgroup.threads")
        if directories:
            directory, unified = directories[0]
            files[f"{directory}/{'cgroup.threads' if unified else 'tasks'}"] = None
    return list(files)
