# SPDX-License-Identifier: GPL-2.0-or-later
"""Where helpers are to run: CPUs, cgroups, and why one does not get on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from qemu_prefault.agents import ptrace
from qemu_prefault.host.headroom import parse_mountinfo
from qemu_prefault.host.placement import (
    helper_cpus,
    node_cpus,
    parse_cpu_list,
    threads_files,
    why_stalled,
)

NODES = [frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})]
ALL = frozenset(range(8))


def cpus(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})],
)
def test_cpu_list(text: str, expected: set[int]) -> None:
    assert parse_cpu_list(text) == expected


@pytest.mark.parametrize(
    ("main", "vcpu", "real_time", "best"),
    [
        (ALL, ALL, cpus(), ALL),
        (ALL, cpus(5), cpus(), NODES[1]),  # pinned: the node's other CPUs as well
        (ALL, cpus(5), cpus(5), cpus(4, 6, 7)),  # a real-time vCPU keeps its CPU
        (cpus(0, 4), cpus(5), cpus(5), cpus(4)),  # <emulatorpin>
        (cpus(0, 1), cpus(5), cpus(5), cpus(4, 6, 7)),  # of another node: memory counts
        (ALL, cpus(5), ALL, NODES[1]),  # real-time threads everywhere
        (cpus(0), cpus(0), cpus(0), cpus(1, 2, 3)),
    ],
)
def test_best_cpus(
    main: frozenset[int], vcpu: frozenset[int], real_time: frozenset[int], best: frozenset[int]
) -> None:
    choices = helper_cpus(main, vcpu, NODES, real_time)
    assert choices[0] == best
    assert main in choices and len(set(choices)) == len(choices)


def test_without_nodes_the_main_threads_cpus_do() -> None:
    assert helper_cpus(ALL, cpus(3), [], cpus(3)) == [ALL - cpus(3), ALL]


def test_this_hosts_nodes_have_all_cpus() -> None:
    nodes = node_cpus()
    if not nodes:
        pytest.skip("no NUMA nodes in /sys")
    assert frozenset(os.sched_getaffinity(0)) <= frozenset().union(*nodes.values())


def test_only_other_cgroups_are_left() -> None:
    mounts = parse_mountinfo(
        "1 2 0:3 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "1 2 0:4 / /cg/cpuset rw - cgroup cgroup rw,cpuset\n"
        "1 2 0:5 / /cg/unified rw - cgroup2 cgroup2 rw\n"
    )
    main = {"cpu": "/vm/emulator", "cpuacct": "/vm/emulator", "cpuset": "/vm", "": "/vm/emulator"}
    helper = {"cpu": "/vm/vcpu0", "cpuacct": "/vm/vcpu0", "cpuset": "/vm", "": "/vm/vcpu0"}
    assert threads_files(main, helper, mounts) == [
        "/cg/cpu/vm/emulator/tasks",
        "/cg/unified/vm/emulator/cgroup.threads",
    ]
    assert threads_files(main, main, mounts) == []


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [
        ("input()", 0, "waits in the kernel"),
        ("while True: pass", 0, "busy"),
        ("input()", signal.SIGSTOP, "QEMU is stopped"),
    ],
)
def test_reason_of_a_stall(code: str, number: int, expected: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True); {code}" if "while" not in code
         else f"print(flush=True)\n{code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        if number:
            process.send_signal(number)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert expected in why_stalled(process.pid, process.pid, 0.5)
    finally:
        process.kill()
        process.communicate()


def test_stall_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stall = ptrace._Stall()
    told = []
    for now, state in [(10, 1), (11.9, 1), (12.1, 1), (20, 1), (21, 2), (22, 2), (23.5, 2)]:
        clock[0] = now
        told.append(stall.is_new(state))
    assert told == [False, False, True, False, False, False, True]
