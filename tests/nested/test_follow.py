# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that ``--follow`` prefaults again after resets and hotplug."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qemu_prefault_lab.guest import Guest
from support.guest import Follower, check_memory, faults_of_pass, plug_dimm
from support.process import leftovers

pytestmark = [pytest.mark.any_agent, pytest.mark.agents("attach", "qmp")]
MIB = 1 << 20
WORKLOAD_MIB = 32
PAGES = WORKLOAD_MIB << 8
MEMORY_MIB = 256
DIMM = 128 * MIB  # the smallest size that Linux accepts


def wait_complete(follower: Follower, guest: Guest) -> dict[str, Any]:
    """Wait until a run has prefaulted all memory, and return that run's event."""
    while True:
        event = follower.event()
        assert event["event"] == "prefaulted", event
        if guest.stats()["pages_4k"] << 12 >= event["bytes"]:
            assert event["remaining"] == 0
            return event


@pytest.fixture
def follower(guest: Guest) -> Iterator[Follower]:
    with Follower("--qmp", str(guest.qmp_path)) as running:
        yield running


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest(
        memory_mib=MEMORY_MIB,
        memory="slots=2,maxmem=2G",
        workload_mib=WORKLOAD_MIB,
        args=["-action", "reboot=reset"],
    ) as guest:
        guest.wait_ready()
        yield guest


def test_reset_guest_is_prefaulted(guest: Guest, follower: Follower) -> None:
    guest.reset()
    guest.wait_ready()
    event = wait_complete(follower, guest)
    assert event["why"] == "the tables were dropped"
    assert faults_of_pass(guest) <= PAGES / 100
    guest.qmp("quit")
    assert follower.process.wait(60) == 0


@pytest.mark.full
def test_dimm_plug_and_unplug(guest: Guest, follower: Follower) -> None:
    plug_dimm(guest, DIMM)
    event = wait_complete(follower, guest)
    assert event["bytes"] >= DIMM
    assert guest.stats()["pages_4k"] << 12 >= (MEMORY_MIB - 1) * MIB + DIMM

    guest.qmp("device_del", id="dimm-d0")
    guest.wait_event("DEVICE_DELETED")
    guest.qmp("object-del", id="d0")
    event = wait_complete(follower, guest)
    assert event["why"] == "the tables were dropped"
    assert event["bytes"] < MEMORY_MIB * MIB
    check_memory(guest)
    assert guest.status() == "running"
    assert leftovers(guest.pid) == []
