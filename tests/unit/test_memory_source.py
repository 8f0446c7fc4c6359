# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the limits of host memory with simulated NUMA nodes and huge page pools."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault.errors import UnsupportedError
from qemu_prefault.host import memory_source, proc_files
from qemu_prefault.host.mappings import MemoryMapping
from qemu_prefault.host.memory_source import (
    MemorySource,
    confining_nodes,
    node_limit,
    parse_node_list,
    parse_numa_maps,
    task_nodes,
)
from qemu_prefault.host.procfs import Process
from qemu_prefault.libvirt.prelaunch import check_plain_layout

MEMINFO = """\
Node 1 MemTotal:       1048576 kB
Node 1 MemFree:          20480 kB
Node 1 Inactive(file):    4096 kB
"""
NUMA_MAPS = """\
55d4c0000000 default file=/usr/bin/qemu mapped=10 N0=10 kernelpagesize_kB=4
7f0000000000 bind:1 file=/memfd:ram dirty=2 N1=2 kernelpagesize_kB=2048
7f1000000000 interleave:0-1 anon=3 dirty=3 N0=2 N1=1 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("0", (0,)),
        ("0-2,5\n", (0, 1, 2, 5)),
        ("", ()),
        ("x", ()),
        ("1-", ()),
        ("12345", ()),
    ],
)
def test_node_lists(text: str, nodes: tuple[int, ...]) -> None:
    assert parse_node_list(text) == nodes


def test_numa_maps_policy_and_page_size() -> None:
    assert parse_numa_maps(NUMA_MAPS, 0x7F0000000000) == ((1,), 2 << 20)
    assert parse_numa_maps(NUMA_MAPS, 0x7F1000000000) == ((), 4096)
    assert parse_numa_maps(NUMA_MAPS, 0x1000) == ((), 4096)


@given(st.text(), st.integers(0, 1 << 48))
def test_parsers_accept_any_text(text: str, start: int) -> None:
    parse_node_list(text)
    parse_numa_maps(text, start)


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a host with two NUMA nodes that process 7 may use."""
    nodes, proc = tmp_path / "node", tmp_path / "proc"
    (nodes / "node1").mkdir(parents=True)
    (nodes / "has_memory").write_text("0-1\n")
    (nodes / "node1/meminfo").write_text(MEMINFO)
    (proc / "7").mkdir(parents=True)
    (proc / "7/status").write_text("Name:\tqemu\nMems_allowed_list:\t0-1\n")
    (tmp_path / "min_free_kbytes").write_text("1024\n")
    monkeypatch.setattr(memory_source, "NODES", nodes)
    monkeypatch.setattr(memory_source, "MIN_FREE", tmp_path / "min_free_kbytes")
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(proc))
    return tmp_path


def test_node_limit_counts_free_and_inactive_file_memory(two_nodes: Path) -> None:
    limit = node_limit((1,))
    assert (limit.name, limit.available) == ("NUMA node 1", (20480 + 4096 - 1024) << 10)
    assert limit.contended


def test_node_limit_excludes_what_the_kernel_keeps(two_nodes: Path) -> None:
    (two_nodes / "min_free_kbytes").write_text("67584\n")
    assert node_limit((1,)).available == 0


def test_policy_limits_nodes(two_nodes: Path) -> None:
    assert confining_nodes(Process(7, 0), ()) == ()
    assert confining_nodes(Process(7, 0), (1,)) == (1,)
    assert confining_nodes(Process(7, 0), (0, 1)) == ()


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("55d4c0000000 bind:1 file=/usr/bin/qemu mapped=10\n55d4c0001000 default\n", (1,)),
        ("55d4c0000000 bind=static:0-1 file=/usr/bin/qemu mapped=10\n", (0, 1)),
        ("55d4c0000000 prefer:1 file=/usr/bin/qemu mapped=10\n", ()),
        ("55d4c0000000 default\n7f0000000000 bind:1\n", ()),
        ("x bind:1\n", ()),
        ("", ()),
    ],
)
def test_policy_of_the_main_thread(two_nodes: Path, text: str, nodes: tuple[int, ...]) -> None:
    (two_nodes / "proc/7/numa_maps").write_text(text)
    assert task_nodes(Process(7, 0)) == nodes


def test_cpuset_limits_nodes(two_nodes: Path) -> None:
    (two_nodes / "proc/7/status").write_text("Mems_allowed_list:\t0\n")
    assert confining_nodes(Process(7, 0), ()) == (0,)
    # A policy has no effect if none of its nodes is in the cpuset.
    assert confining_nodes(Process(7, 0), (1,)) == (0,)


HUGE = 2 << 20
HUGETLB = MemoryMapping(0x7F0000000000, 0x7F0008000000, "rw-s", 0, (0, 9), 5, "/memfd:ram")


@pytest.fixture
def full_pool(two_nodes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a pool of 64 free huge pages, all reserved for the HUGETLB mapping."""
    pool = two_nodes / "hugepages-2048kB"
    pool.mkdir()
    for name, pages in (("free", 64), ("resv", 64), ("nr_overcommit", 0), ("surplus", 0)):
        (pool / f"{name}_hugepages").write_text(f"{pages}\n")
    read = proc_files.read_optional
    system = "/sys/kernel/mm/hugepages/"

    def redirected(path: str) -> str | None:
        return read(path.replace(system, f"{two_nodes}/"))

    monkeypatch.setattr("qemu_prefault.host.headroom.read_optional", redirected)
    return two_nodes


def test_reserved_huge_pages_are_guaranteed_to_every_part_of_the_mapping(full_pool: Path) -> None:
    source = MemorySource(Process(7, 0), HUGETLB, HUGE, reserved=True)
    assert [limit.name for limit in source.limits(640 << 10)] == []


def test_huge_pages_reserved_for_others_are_not_available(full_pool: Path) -> None:
    source = MemorySource(Process(7, 0), HUGETLB, HUGE, reserved=False)
    assert [(limit.name, limit.available) for limit in source.limits(HUGE)] == [("hugetlb", 0)]


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        (("-machine", "pc-q35-8.1,max-ram-below-4g=1G"), 4 << 30),
        (("-machine", "pc-q35-8.1"), 1100 << 30),
    ],
)
def test_hook_refuses_unknown_layouts(arguments: tuple[str, ...], memory: int) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        check_plain_layout(arguments, memory)
    assert refusal.value.code == "layout"
    check_plain_layout(("-machine", "pc-q35-8.1"), 4 << 30)
