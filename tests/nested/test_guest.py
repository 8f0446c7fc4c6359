# SPDX-License-Identifier: GPL-2.0-or-later
"""The L2 guests the other tests stand on. Runs inside L1."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest, GuestError, reserve_hugepages, thp

pytestmark = pytest.mark.guest

BYTES_4K, BYTES_2M = 4096, 2 << 20
WORKLOAD_MIB = 64


@pytest.fixture
def small_pages() -> Iterator[None]:
    before = thp("never")
    yield
    thp(before)


def mapped_bytes(guest: Guest) -> int:
    stats = guest.stats()
    return stats["pages_4k"] * BYTES_4K + stats["pages_2m"] * BYTES_2M


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
@pytest.mark.parametrize("kernel", ["vmlinux", "vmlinuz"])
def test_boots_and_remembers_its_memory(machine: str, kernel: str) -> None:
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
            assert guest.command("pass")["bad"] == 0
            if backing == "hugetlb":
                assert guest.stats()["pages_2m"] >= WORKLOAD_MIB // 2
    finally:
        reserve_hugepages(0)


def test_several_vcpus() -> None:
    with Guest(smp=3, workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        assert len(guest.qmp("query-cpus-fast")) == 3
        assert guest.command("pass")["bad"] == 0


def test_a_guest_goes_on_where_it_was_saved(tmp_path: Path, small_pages: None) -> None:
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
        assert guest.command("pass")["bad"] == 0
        # Each page of the workload cost its own fault, which is what there is to win.
        assert guest.stats()["pf_taken"] >= WORKLOAD_MIB * 256


def test_works_in_the_background_and_answers() -> None:
    with Guest(workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        guest.command("run")
        first = guest.command("status")
        assert first["running"] == 1
        while guest.command("status")["passes"] == first["passes"]:
            pass
        assert guest.command("stop")["bad"] == 0
        assert guest.command("status")["running"] == 0


def test_a_changed_page_is_noticed() -> None:
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
        assert guest.command("pass")["bad"] == 0


def test_paused_before_its_first_instruction() -> None:
    with Guest(paused=True) as guest:
        assert guest.status() == "prelaunch"
        assert guest.stats()["pf_taken"] == 0
        guest.qmp("cont")
        guest.wait_ready()


def test_tcg() -> None:
    with Guest(accel="tcg", paused=True) as guest:
        assert guest.qmp("query-kvm")["enabled"] is False


def test_what_qemu_said_is_in_the_error() -> None:
    with pytest.raises(GuestError, match="invalid option"):
        Guest(args=["-nonsense"])


def test_the_end_of_qemu_is_noticed_at_once() -> None:
    with Guest() as guest:
        guest.wait_ready()
        guest.process.kill()
        with pytest.raises(GuestError, match="QEMU"):
            guest.command("alloc 64", timeout=1000)


def test_an_error_of_the_guest_is_raised() -> None:
    with Guest() as guest:
        guest.wait_ready()
        with pytest.raises(GuestError, match="nothing is allocated"):
            guest.command("pass")
