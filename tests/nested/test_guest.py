# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the lab's L2 guests, which the other tests in this directory use."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest, GuestError, reserve_hugepages
from support.guest import check_memory, faults, mapped_bytes

pytestmark = pytest.mark.guest

WORKLOAD_MIB = 64


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
@pytest.mark.parametrize("kernel", ["vmlinux", "vmlinuz"])
def test_boot_and_memory_check(machine: str, kernel: str) -> None:
    with Guest(machine=machine, kernel=kernel, workload_mib=WORKLOAD_MIB) as guest:
        ready = guest.wait_ready()
        assert ready["mib"] == WORKLOAD_MIB
        for _ in range(2):
            answer = guest.command("pass")
            assert (answer["pages"], answer["bad"]) == (WORKLOAD_MIB * 256, 0)
        assert mapped_bytes(guest) >= WORKLOAD_MIB << 20


@pytest.mark.parametrize("backing", [None, "ram", "memfd", "file", "file-private", "hugetlb"])
def test_backings(backing: str | None) -> None:
    if backing == "hugetlb":
        assert reserve_hugepages(192) == 192
    try:
        with Guest(backing=backing) as guest:
            guest.wait_ready()
            guest.command(f"alloc {WORKLOAD_MIB}")
            check_memory(guest)
            if backing == "hugetlb":
                assert guest.stats()["pages_2m"] >= WORKLOAD_MIB // 2
    finally:
        reserve_hugepages(0)


def test_multiple_vcpus() -> None:
    with Guest(smp=3, workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        assert len(guest.qmp("query-cpus-fast")) == 3
        check_memory(guest)


def test_save_and_restore(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with Guest(workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        guest.command("pass")
        before = guest.command("checksum")["sum"]
        guest.save(state)
    with Guest(incoming=state) as guest:
        guest.wait_restored()
        assert guest.status() == "paused"
        assert mapped_bytes(guest) == 0
        guest.qmp("cont")
        assert guest.command("checksum")["sum"] == before
        check_memory(guest)
        # Each page of the workload has caused a fault. Prefaulting avoids these faults.
        assert faults(guest) >= WORKLOAD_MIB * 256


def test_background_workload() -> None:
    with Guest(workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        guest.command("run")
        first = guest.command("status")
        assert first["running"] == 1
        while guest.command("status")["passes"] == first["passes"]:
            pass
        assert guest.command("stop")["bad"] == 0
        assert guest.command("status")["running"] == 0


def test_changed_page_is_detected() -> None:
    with Guest(backing="file", workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        guest.command("pass")
        page, generation = 1234, 1
        word = (((generation << 40 | page) * 0x9E3779B97F4A7C15) & (2**64 - 1)) | 1
        with (guest.directory / "memory").open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
            where = memory.find(word.to_bytes(8, "little"))
            assert where >= 0
            memory[where] ^= 0x80
            memory.close()
        assert guest.command("pass")["bad"] == 1
        check_memory(guest)


def test_start_paused() -> None:
    with Guest(paused=True) as guest:
        assert guest.status() == "prelaunch"
        assert faults(guest) == 0
        guest.qmp("cont")
        guest.wait_ready()


def test_tcg() -> None:
    with Guest(accel="tcg", paused=True) as guest:
        assert guest.qmp("query-kvm")["enabled"] is False


def test_error_contains_qemu_stderr() -> None:
    with pytest.raises(GuestError, match="invalid option"):
        Guest(args=["-nonsense"])


def test_qemu_exit_is_detected() -> None:
    with Guest() as guest:
        guest.wait_ready()
        guest.process.kill()
        with pytest.raises(GuestError, match="QEMU"):
            guest.command("alloc 64", timeout=1000)


def test_guest_error_is_raised() -> None:
    with Guest() as guest:
        guest.wait_ready()
        with pytest.raises(GuestError, match="nothing is allocated"):
            guest.command("pass")
