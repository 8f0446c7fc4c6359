# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that prefaulting on small NUMA nodes kills no QEMU and exhausts no pool.

The lab's ``--numa`` option gives L1 one node with 3 GiB and one node with 1 GiB.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

import pytest

from qemu_prefault.host.headroom import parse_key_values
from qemu_prefault_lab.guest import Guest, reserve_hugepages
from qemu_prefault_lab.wait import wait_for
from support.guest import GuestOptions, check_memory, prefault, ram_hva, start_tool
from support.process import leftovers, resident_bytes

MIB = 1 << 20
NODES = Path("/sys/devices/system/node")
CGROUPS = Path("/sys/fs/cgroup")
BOUND = "host-nodes=1,policy=bind"


def node_bytes(node: int, key: str) -> int:
    """Return a field of a node's meminfo in bytes, or 0 if the node is absent."""
    path = NODES / f"node{node}/meminfo"
    found = re.search(rf" {key}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) << 10 if found else 0


def numa_maps_line(guest: Guest) -> dict[str, str]:
    """Return the numa_maps fields of the guest's RAM, such as pages per node."""
    start = f"{ram_hva(guest):x} "
    for line in Path(f"/proc/{guest.pid}/numa_maps").read_text().splitlines():
        if line.startswith(start):
            return dict(word.split("=", 1) for word in line.split() if "=" in word)
    raise AssertionError(f"numa_maps lists no mapping at {start}")


pytestmark = [
    pytest.mark.numa,
    pytest.mark.skipif(
        not 0 < node_bytes(1, "MemTotal") <= 1024 * MIB,
        reason="this host has no NUMA node 1 with about 1 GiB (lab pytest --numa)",
    ),
]


# --- RAM bound to a node ---


@pytest.mark.parametrize("backing", ["ram", "memfd", "file"])
def test_ram_bound_to_a_small_node_is_refused(backing: str) -> None:
    """Check that RAM larger than its node is refused (vllm#51584, kubevirt#6981).

    If the tool populated such RAM, the OOM killer would kill QEMU.
    """
    free = node_bytes(1, "MemFree")
    with Guest(memory_mib=1500, backing=f"{backing},{BOUND}", paused=True) as guest:
        for option in ("--dry-run", "--populate-only", "--cont"):
            result = prefault(guest, option)
            assert (result.status, result.error["code"]) == (5, "no-memory"), option
            assert "NUMA node 1 has only" in result.error["cause"]
        assert guest.status() == "prelaunch"
        assert node_bytes(1, "MemFree") > free - 64 * MIB


@pytest.mark.parametrize("policy", ["preferred", "interleave"])
def test_unbound_ram_may_exceed_a_node(policy: str) -> None:
    nodes = "1" if policy == "preferred" else "0-1"
    backing = f"ram,host-nodes={nodes},policy={policy}"
    with Guest(memory_mib=1500, backing=backing, paused=True) as guest:
        prefault(guest, "--populate-only").complete()
        assert guest.status() == "prelaunch"


def test_bound_ram_that_fits_is_populated() -> None:
    with Guest(memory_mib=512, backing=f"ram,{BOUND}", paused=True) as guest:
        prefault(guest).complete()
        line = numa_maps_line(guest)
        assert int(line["N1"]) * 4096 >= 511 * MIB and "N0" not in line


#: Guest RAM that fits into node 1 when the run begins, but not after a neighbour takes 300 MiB.
SHORT_MIB = 820


class Neighbour:
    """A process that allocates memory on node 1 on request."""

    _SCRIPT = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
while True:
    size = int(sys.stdin.readline() or exit())
    area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    mask = ctypes.c_ulong(2)
    # SYS_mbind (x86-64): MPOL_BIND to node 1
    if libc.syscall(237, ctypes.c_void_p(address), ctypes.c_ulong(size), 2,
                    ctypes.byref(mask), ctypes.c_ulong(64), 0):
        raise OSError(ctypes.get_errno(), "mbind")
    area.madvise(23)  # MADV_POPULATE_WRITE
    print("taken", flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._SCRIPT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def take(self, size: int) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{size}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "taken\n", self.process.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    process = Neighbour()
    yield process
    process.end()


@pytest.mark.parametrize("option", ["--populate-only", "--cont"])
def test_node_that_runs_short_ends_the_run(neighbour: Neighbour, option: str) -> None:
    with Guest(memory_mib=SHORT_MIB, backing=f"ram,{BOUND}", workload_mib=8, paused=True) as guest:
        hva = ram_hva(guest)
        tool = start_tool(guest, option, "--chunk", "65536")
        wait_for(lambda: resident_bytes(guest.pid, hva) > 20 * MIB, "populating has begun", 120)
        neighbour.take(300 * MIB)
        result = tool.finish()
        assert result.status == 3, (result.stdout, result.stderr)
        assert "memory-short" in result.warnings
        assert "NUMA node 1" in result.stdout
        assert 0 < result.report["bytes"]["remaining"] < SHORT_MIB * MIB
        assert neighbour.process.poll() is None
        if option == "--cont":
            guest.wait_ready()
            check_memory(guest)
        assert guest.alive
        assert leftovers(guest.pid) == []


# --- a cpuset ---


@pytest.fixture
def on_node_1() -> Iterator[list[str]]:
    """Return a command prefix that confines a program to the memory of node 1."""
    (CGROUPS / "cgroup.subtree_control").write_text("+cpuset")
    group = CGROUPS / "node1"
    group.mkdir()
    (group / "cpuset.mems").write_text("1")
    yield ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"]
    wait_for(lambda: not (group / "cgroup.procs").read_text(), "the cgroup is empty")
    group.rmdir()
    (CGROUPS / "cgroup.subtree_control").write_text("-cpuset")


@pytest.mark.parametrize("backing", ["ram", "memfd"])
def test_ram_of_a_cpuset_is_refused(on_node_1: list[str], backing: str) -> None:
    with Guest(memory_mib=1500, backing=backing, paused=True, wrapper=on_node_1) as guest:
        result = prefault(guest, "--populate-only")
        assert (result.status, result.error["code"]) == (5, "no-memory")
        assert "NUMA node 1 has only" in result.error["cause"]
        assert guest.status() == "prelaunch"


# --- the plugin ---


def check_plugin_leaves_memory(guest: Guest) -> None:
    guest.wait_ready()
    guest.wait_kept()
    check_memory(guest)
    assert node_bytes(1, "MemFree") > 64 * MIB


@pytest.mark.parametrize("backing", ["ram", "memfd"])
def test_plugin_leaves_memory_on_a_bound_node(backing: str) -> None:
    options: GuestOptions = {
        "memory_mib": 1500,
        "backing": f"{backing},{BOUND}",
        "workload_mib": 64,
    }
    with Guest(**options) as guest:  # the guest runs without the plugin's help
        guest.wait_ready()
        check_memory(guest)
    with Guest(**options, plugin=[]) as guest:
        check_plugin_leaves_memory(guest)


def test_plugin_leaves_memory_of_a_cpuset(on_node_1: list[str]) -> None:
    with Guest(memory_mib=1500, workload_mib=64, plugin=[], wrapper=on_node_1) as guest:
        check_plugin_leaves_memory(guest)


# --- huge pages ---


def pool(node: int, name: str) -> Path:
    return NODES / f"node{node}/hugepages/hugepages-2048kB" / name


@pytest.fixture
def pools() -> Iterator[None]:
    """Allocate 200 huge pages on node 0 and 60 on node 1."""
    for node, count in ((0, 200), (1, 60)):
        pool(node, "nr_hugepages").write_text(str(count))
        assert int(pool(node, "free_hugepages").read_text()) == count
    yield
    for node in (0, 1):
        pool(node, "nr_hugepages").write_text("0")


def test_short_pool_of_a_node_is_refused(pools: None) -> None:
    """Check that RAM larger than its node's pool is refused.

    If the tool populated such RAM, QEMU would get SIGBUS (kubevirt#6981, cloud-hypervisor#7387).
    """
    with Guest(memory_mib=256, backing=f"hugetlb,{BOUND}", paused=True) as guest:
        free = int(pool(1, "free_hugepages").read_text())  # others hold the kernel image
        result = prefault(guest)
        assert (result.status, result.error["code"]) == (5, "no-memory")
        assert f"hugetlb on NUMA node 1 has only {2 * free:.1f} MiB" in result.error["cause"]
        assert int(pool(1, "free_hugepages").read_text()) == free
        assert guest.status() == "prelaunch"


def test_sufficient_pool_of_a_node_is_used(pools: None) -> None:
    with Guest(memory_mib=112, backing=f"hugetlb,{BOUND}", paused=True) as guest:
        prefault(guest).complete()
        assert int(pool(1, "free_hugepages").read_text()) == 4


def test_plugin_leaves_a_short_pool(pools: None) -> None:
    with Guest(memory_mib=256, backing=f"hugetlb,{BOUND}", plugin=[], workload_mib=8) as guest:
        guest.wait_ready()
        guest.wait_kept()
        check_memory(guest)


# --- several runs at once ---

HERD = 3
HERD_MIB = 512


@pytest.fixture
def make_herd() -> Iterator[Callable[..., list[Guest]]]:
    """Return a function that starts three paused guests larger than the host."""
    with contextlib.ExitStack() as stack:

        def make(**options: Unpack[GuestOptions]) -> list[Guest]:
            guests = [
                stack.enter_context(
                    Guest(memory_mib=HERD_MIB, workload_mib=8, paused=True, **options)
                )
                for _ in range(HERD)
            ]
            surplus = available() - (2 * HERD_MIB + 300) * MIB
            stack.callback(reserve_hugepages, 0)
            assert reserve_hugepages(surplus // (2 * MIB)) > 0
            return guests

        yield make


def available() -> int:
    text = Path("/proc/meminfo").read_text()
    return parse_key_values(text)["MemAvailable"]


def test_runs_at_once_end_no_guest(make_herd: Callable[..., list[Guest]]) -> None:
    """Prefault all guests at once, as after a reboot (harvester#2522, kubevirt#4560)."""
    guests = make_herd()
    tools = [start_tool(guest, "--populate-only") for guest in guests]
    results = [tool.finish(600) for tool in tools]
    assert all(guest.alive for guest in guests)
    for result in results:
        if result.status == 3:
            assert "memory-short" in result.warnings
        elif result.status:
            assert (result.status, result.error["code"]) == (5, "no-memory"), result.stderr
    assert any(result.status == 0 for result in results)
    assert any(result.status for result in results)  # the host cannot hold all guests
    for guest in guests:
        guest.qmp("cont")
    for guest in guests:
        guest.wait_ready(600)
        check_memory(guest)


def test_plugin_guests_at_once_survive(make_herd: Callable[..., list[Guest]]) -> None:
    guests = make_herd(plugin=[])
    for guest in guests:
        guest.qmp("cont")
    for guest in guests:
        guest.wait_ready(600)
        guest.wait_kept(600)
    assert all(guest.alive for guest in guests)
    assert any("populating needs" in guest.stderr for guest in guests)
    for guest in guests:
        check_memory(guest)
