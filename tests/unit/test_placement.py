# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the choice of CPUs and cgroups for helpers."""

from __future__ import annotations

import os

import pytest

from qemu_prefault.host.headroom import parse_mountinfo
from qemu_prefault.host.placement import (
    helper_cpus,
    node_cpus,
    parse_cpu_list,
    threads_files,
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
        (ALL, cpus(5), cpus(), NODES[1]),  # pinned vCPU: all CPUs of its node
        (ALL, cpus(5), cpus(5), cpus(4, 6, 7)),  # real-time vCPU: the other CPUs of its node
        (cpus(0, 4), cpus(5), cpus(5), cpus(4)),  # <emulatorpin>
        (
            cpus(0, 1),
            cpus(5),
            cpus(5),
            cpus(4, 6, 7),
        ),  # the node of the vCPU has priority over the CPUs of QEMU's main thread
        (ALL, cpus(5), ALL, NODES[1]),  # real-time threads run on all CPUs
        (cpus(0), cpus(0), cpus(0), cpus(1, 2, 3)),
    ],
)
def test_best_cpus(
    main: frozenset[int], vcpu: frozenset[int], real_time: frozenset[int], best: frozenset[int]
) -> None:
    choices = helper_cpus(main, vcpu, NODES, real_time)
    assert choices[0] == best
    assert main in choices and len(set(choices)) == len(choices)


def test_cpus_without_numa() -> None:
    assert helper_cpus(ALL, cpus(3), [], cpus(3)) == [ALL - cpus(3), ALL]


def test_node_cpus_of_this_host() -> None:
    nodes = node_cpus()
    if not nodes:
        pytest.skip("/sys has no NUMA nodes")
    assert frozenset(os.sched_getaffinity(0)) <= frozenset().union(*nodes.values())


def test_only_different_cgroups_are_changed() -> None:
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
