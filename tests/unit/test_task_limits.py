# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool computes how many more threads QEMU may start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_prefault.agents import injector
from qemu_prefault.agents.base import VcpuThread
from qemu_prefault.agents.control_page import AREA_SIZE
from qemu_prefault.errors import RefusedError
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.task_limits import (
    HELPER_BYTES,
    MIN_LEFT,
    RESERVE,
    TaskLimit,
    address_limits,
    mapping_limits,
    parse_limits,
    parse_pending,
    pids_limits,
    strictest,
    task_limits,
)


def left(count: int) -> TaskLimit:
    return TaskLimit("a limit", count, "")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (left(0), 0),
        (left(MIN_LEFT - 1), 0),
        (left(MIN_LEFT), 1),
        (left(RESERVE), 1),
        (left(RESERVE + 1), 1),
        (left(RESERVE + 2), 2),
        (left(RESERVE + 8), 8),
        (left(1 << 30), 8),
    ],
)
def test_reserve_is_left(limit: TaskLimit, expected: int) -> None:
    assert limit.helpers(8) == expected


def test_strictest_limit_is_named() -> None:
    plenty, few, none = left(1000), left(RESERVE + 3), left(1)
    assert strictest([], 8) == (8, None)
    assert strictest([plenty], 8) == (8, None)
    assert strictest([plenty, few], 8) == (3, few)
    assert strictest([few, none, plenty], 8) == (0, none)
    assert strictest([few], 2) == (2, None)


def write_group(directory: Path, most: str, used: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pids.max").write_text(f"{most}\n")
    (directory / "pids.current").write_text(f"{used}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_ancestor_cgroups_count(tmp_path: Path, version: int) -> None:
    write_group(tmp_path / "machine.slice/qemu/emulator", "max", 3)
    write_group(tmp_path / "machine.slice/qemu", "20", 5)
    write_group(tmp_path / "machine.slice", "8", 9)
    if version == 1:
        cgroup = "5:pids:/machine.slice/qemu/emulator\n0::/elsewhere\n"
        mounts = f"1 2 0:3 / {tmp_path} rw - cgroup cgroup rw,pids\n"
    else:
        cgroup = "0::/machine.slice/qemu/emulator\n"
        mounts = f"1 2 0:3 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    limits = pids_limits(cgroup, mounts)
    assert [(limit.left, limit.detail) for limit in limits] == [
        (15, "20, 5 in use"),
        (0, "8, 9 in use"),
    ]
    assert str(tmp_path / "machine.slice") in limits[1].name


def test_rlimits_of_a_process() -> None:
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max cpu time              unlimited            unlimited            seconds   \n"
        "Max processes             4711                 96365                processes \n"
        "Max nice priority         0                    0                    \n"
    )
    assert parse_limits(text) == {"Max processes": 4711, "Max nice priority": 0}
    assert parse_pending("Threads:\t1\nSigQ:\t3/96365\nSigPnd:\t0\n") == (3, 96365)
    assert parse_pending("Threads:\t1\n") is None


def test_limits_of_this_process() -> None:
    names = " ".join(limit.name for limit in task_limits(Process.find(os.getpid())))
    assert "pending signals" in names and "kernel.threads-max" in names


@pytest.mark.parametrize(
    ("cpus", "nodes", "expected"),
    [
        (1, [None], [0]),
        (1, [None] * 4, [0, 1]),
        (2, [None] * 288, [0, 1]),
        (4, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 4, 5]),
        (3, [0, 1, 2, 3], [0, 1, 2]),
        (64, [0] * 32 + [1] * 32, [0, 1, 2, 3, 32, 33, 34, 35]),
    ],
)
def test_chosen_vcpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, nodes: list[int | None], expected: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setattr(injector, "task_limits", lambda process: [])
    threads = [VcpuThread(100 + i, -1, None, node, index=i) for i, node in enumerate(nodes)]
    chosen = injector.choose_threads(Process(os.getpid(), 0), threads)
    assert [thread.index for thread in chosen] == expected


def test_hidden_pids_cgroup_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injector, "task_limits", lambda process: [])
    monkeypatch.setattr(injector, "hidden_cgroup", lambda process, controller: f"{controller}: no")
    process = Process(os.getpid(), 0)
    threads = [VcpuThread(100 + i, -1, None, index=i) for i in range(4)]
    with pytest.raises(RefusedError, match="may start is unknown: pids: no") as caught:
        injector.choose_threads(process, threads)
    assert caught.value.code == "hidden-cgroup" and "--force" in caught.value.remedy
    assert len(injector.choose_threads(process, threads, force=True)) == 1


@pytest.mark.parametrize(
    ("used", "expected"),
    [(65530 - 13, 0), (65530 - 14, 1), (65530 - 259, 1), (65530 - 260, 2), (100, 8)],
)
def test_mappings_are_left(
    used: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/vm/max_map_count").write_text("65530\n")
    (tmp_path / "1").mkdir()
    (tmp_path / "1/maps").write_text("7f00-7f01 r--p 0 00:00 0\n" * used)
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(tmp_path))
    (limit,) = mapping_limits(Process(1, 0))
    assert limit.helpers(8) == expected
    assert (
        f"only {65530 - used} more mappings, because vm.max_map_count is 65530, {used} in use"
        in (limit.cause(1))
    )
    assert limit.remedy == "sysctl vm.max_map_count=131060"


def test_missing_map_count_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(tmp_path))
    assert mapping_limits(Process(1, 0)) == []


STACK = 8 << 20


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (8240 << 10, 0),
        (3 * STACK + HELPER_BYTES - 1, 0),
        (3 * STACK + HELPER_BYTES, 1),
        (RESERVE * STACK + 2 * HELPER_BYTES, 2),
        (1 << 40, 8),
    ],
)
@pytest.mark.parametrize(
    ("name", "field", "option"),
    [
        ("Max address space", "VmSize", "as"),
        ("Max data size", "VmData", "data"),
        ("Max locked memory", "VmLck", "memlock"),
    ],
)
def test_stacks_are_left(name: str, field: str, option: str, free: int, expected: int) -> None:
    limits = {name: 100 + free, "Max stack size": STACK}
    (limit,) = address_limits(limits, {field: 100}, 7, locks=True)
    assert limit.helpers(8) == expected
    assert f"{free >> 10} KiB" in limit.cause(7) and name in limit.cause(7)
    assert f"prlimit --pid 7 --{option}=unlimited" in limit.remedy


def test_locked_memory_is_limited_only_if_new_mappings_are_locked() -> None:
    limits, status = {"Max locked memory": 65536}, {"VmLck": 0}
    assert address_limits(limits, status, 7, locks=False) == []
    assert len(address_limits(limits, status, 7, locks=True)) == 1


def test_helper_fits_in_its_share() -> None:
    assert AREA_SIZE <= HELPER_BYTES


def test_too_few_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TaskLimit("pids.max of /c", 3, "20, 17 in use")
    monkeypatch.setattr(injector, "task_limits", lambda process: [limit])
    with pytest.raises(
        RefusedError, match=r"only 3 more threads, because pids.max of /c is 20, 17"
    ) as caught:
        injector.choose_threads(Process(os.getpid(), 0), [VcpuThread(1, -1, None)])
    assert caught.value.code == "no-tasks"
