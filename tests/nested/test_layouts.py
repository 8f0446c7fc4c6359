# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the tool maps exactly the guest's RAM on each machine and backend."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from qemu_prefault_lab.guest import Guest, reserve_hugepages
from support.guest import SetThp, mapped_bytes, prefault

pytestmark = pytest.mark.any_agent

MIB = 1 << 20


def sections(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [entry for entry in report["sections"] if entry["name"] == name]


QUICK = {("pc", "ram"), ("q35", "memfd"), ("microvm", "file"), ("pc", "file-private")}


@pytest.mark.parametrize(
    ("machine", "backing"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.full)
        for pair in product(("pc", "q35", "microvm"), ("ram", "memfd", "file", "file-private"))
    ],
)
def test_machines_and_backings(machine: str, backing: str) -> None:
    with Guest(machine=machine, backing=backing, memory_mib=128, paused=True) as guest:
        result = prefault(guest)
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["prefaulted"] >= 127 * MIB
        assert mapped_bytes(guest) >= 127 * MIB
        kinds = {entry["backing"] for entry in sections(result.report, "ram")}
        expected = {"ram": "anonymous", "memfd": "memfd", "file": "file", "file-private": "file"}
        assert all(kind.startswith((expected[backing], "shmem")) for kind in kinds), kinds
        assert ("never-huge" in result.warnings) == (backing != "ram")


def test_transparent_huge_pages(set_thp: SetThp) -> None:
    set_thp("always")
    with Guest(machine="microvm", memory_mib=128, paused=True) as guest:
        assert prefault(guest).status == 0
        assert guest.stats()["pages_2m"] >= 60


def test_hugetlb() -> None:
    if reserve_hugepages(64) < 64:
        pytest.skip("the kernel does not have 64 free huge pages")
    try:
        with Guest(machine="microvm", backing="hugetlb", memory_mib=128, paused=True) as guest:
            result = prefault(guest)
            assert result.status == 0, result.stderr
            assert guest.stats()["pages_2m"] >= 60
    finally:
        reserve_hugepages(0)


@pytest.mark.full
def test_small_hugetlb_pool_is_refused() -> None:
    reserve_hugepages(80)  # enough for the kernel that QEMU loads, but not for all of RAM
    try:
        options = "hugetlb,reserve=off"
        with Guest(machine="microvm", backing=options, memory_mib=256, paused=True) as guest:
            result = prefault(guest, "--populate", "all")
            assert result.status == 5
            assert result.error["code"] == "no-memory"
            assert "hugetlb" in result.error["cause"]
            assert mapped_bytes(guest) == 0
    finally:
        reserve_hugepages(0)


def test_above_four_gib() -> None:
    with Guest(memory_mib=5 * 1024, paused=True) as guest:
        result = prefault(guest, "--range", "4G+32M", "--range", "16M+16M")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["prefaulted"] == 48 * MIB
        assert mapped_bytes(guest) == 48 * MIB


@pytest.mark.full
def test_numa_nodes() -> None:
    args = ["-object", "memory-backend-ram,id=n0,size=64M"]
    args += ["-object", "memory-backend-ram,id=n1,size=64M"]
    args += ["-numa", "node,nodeid=0,cpus=0,memdev=n0", "-numa", "node,nodeid=1,cpus=1,memdev=n1"]
    with Guest(memory_mib=128, smp=2, backing=None, args=args, paused=True) as guest:
        result = prefault(guest)
        assert result.status == 0, result.stderr
        assert sum(s["prefaulted"] for s in sections(result.report, "n1")) == 64 * MIB


def test_virtio_mem_stays_unplugged() -> None:
    args = ["-object", "memory-backend-ram,id=vm0,size=256M"]
    args += ["-device", "virtio-mem-pci,id=vmem0,memdev=vm0,requested-size=0"]
    with Guest(memory_mib=128, memory="maxmem=1G", args=args, paused=True) as guest:
        result = prefault(guest)
        assert result.status == 0, result.stderr
        (absent,) = sections(result.report, "vm0")
        assert absent["populated"] == absent["prefaulted"] == 0
        assert "virtio-mem" in absent["skipped"]
        assert mapped_bytes(guest) < 130 * MIB


def test_nvdimm_and_dimm() -> None:
    args = ["-object", "memory-backend-ram,id=d0,size=32M", "-device", "pc-dimm,memdev=d0"]
    args += ["-object", "memory-backend-ram,id=nv0,size=32M", "-device", "nvdimm,memdev=nv0"]
    with Guest(
        machine="pc,nvdimm=on", memory_mib=128, memory="slots=4,maxmem=1G", args=args, paused=True
    ) as guest:
        result = prefault(guest)
        assert result.status == 0, result.stderr
        for name in ("d0", "nv0"):
            assert sum(s["prefaulted"] for s in sections(result.report, name)) == 32 * MIB, name


def test_device_memory_and_rom_are_skipped() -> None:
    with Guest(machine="pc", memory_mib=128, args=["-device", "VGA"], paused=True) as guest:
        result = prefault(guest)
        assert result.status == 0
        assert result.report["bytes"]["requested"] <= 128 * MIB
        vram = sections(result.report, "vga.vram")
        assert len(vram) <= 1
        assert all(section["prefaulted"] == 0 for section in vram)
