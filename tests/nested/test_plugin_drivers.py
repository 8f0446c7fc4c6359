# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin with virtio-mem and balloon devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import pytest

from qemu_prefault_lab.guest import Guest
from support.guest import GuestOptions, MakeGuest, check_memory

MIB = 1 << 20
VIRTIO_MEM = 256 * MIB
# The tolerance in bytes: QEMU also allocates memory, and the guest's kernel writes metadata.
SLACK = 8 * MIB


@pytest.fixture
def make_guest() -> Iterator[MakeGuest]:
    """Return a function that starts a guest and waits until it is prefaulted.

    Before the function returns, the guest also loads its device drivers.
    """
    guests: list[Guest] = []

    def start(**options: Unpack[GuestOptions]) -> Guest:
        options.setdefault("plugin", [])
        options["memory_mib"] = 256
        options["workload_mib"] = 32
        guest = Guest(**options)
        guests.append(guest)
        guest.wait_ready()
        guest.command("modules")
        guest.wait_kept()
        return guest

    yield start
    for guest in guests:
        guest.kill()


def resident(guest: Guest) -> int:
    """Return QEMU's resident memory in bytes."""
    status = Path(f"/proc/{guest.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def make_virtio_mem_guest(
    make_guest: MakeGuest, properties: str = "", **options: Unpack[GuestOptions]
) -> Guest:
    device = f"virtio-mem-pci,id=vmem,memdev=vm0,requested-size=0{properties}"
    args = ["-object", f"memory-backend-ram,id=vm0,size={VIRTIO_MEM}", "-device", device]
    options["memory"] = "maxmem=2G"
    options["kernel_args"] = "memhp_default_state=online"
    options["args"] = args
    return make_guest(**options)


def request_size(guest: Guest, size: int) -> None:
    """Set virtio-mem's requested size, and wait until the guest has plugged it."""
    guest.qmp("qom-set", path="/machine/peripheral/vmem", property="requested-size", value=size)
    while guest.qmp("query-memory-devices")[0]["data"]["size"] != size:
        guest.wait_event("MEMORY_DEVICE_SIZE_CHANGE")


def virtio_mem_slot(guest: Guest) -> dict[str, Any]:
    slots = guest.wait_kept()["slots"]
    return next(slot for slot in slots if slot["size"] == VIRTIO_MEM and slot["as"] == 0)


@pytest.mark.parametrize("machine", [pytest.param("pc", marks=pytest.mark.full), "q35"])
def test_plugged_prealloc_blocks_are_prefaulted(make_guest: MakeGuest, machine: str) -> None:
    guest = make_virtio_mem_guest(make_guest, ",prealloc=on", machine=machine)
    before, mapped = resident(guest), guest.stats()["pages_4k"]
    assert virtio_mem_slot(guest)["prefaulted"] == 0
    request_size(guest, 64 * MIB)
    assert virtio_mem_slot(guest)["prefaulted"] >= 64 * MIB
    assert guest.stats()["pages_4k"] - mapped >= 64 * 256
    assert abs(resident(guest) - before - 64 * MIB) < SLACK
    request_size(guest, 0)
    guest.control("prefault")
    assert virtio_mem_slot(guest)["resident_only"]
    assert abs(resident(guest) - before) < SLACK
    check_memory(guest)


@pytest.mark.full
def test_plugged_blocks_without_prealloc_stay_absent(make_guest: MakeGuest) -> None:
    guest = make_virtio_mem_guest(make_guest)
    before = resident(guest)
    request_size(guest, 64 * MIB)
    guest.control("prefault")
    guest.wait_kept()
    assert resident(guest) - before < SLACK
    check_memory(guest)


@pytest.mark.full
def test_ballooned_memory_stays_absent(make_guest: MakeGuest) -> None:
    args = ["-device", "virtio-balloon-pci", "-action", "reboot=reset"]
    guest = make_guest(machine="pc", args=args)
    full = resident(guest)
    target = 128 * MIB
    guest.qmp("balloon", value=target)
    while guest.qmp("query-balloon")["actual"] != target:
        guest.wait_event("BALLOON_CHANGE")
    inflated = resident(guest)
    assert full - inflated > 128 * MIB - SLACK
    guest.control("prefault")
    guest.wait_kept()
    assert resident(guest) - inflated < SLACK
    check_memory(guest)
    # The reset deflates the balloon. The plugin must not populate memory that was in the balloon.
    guest.reset()
    guest.wait_ready()
    guest.wait_kept()
    assert full - resident(guest) > 32 * MIB
    check_memory(guest)
