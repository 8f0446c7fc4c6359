# SPDX-License-Identifier: GPL-2.0-or-later
"""``--follow`` without the plugin: what resets and hotplug take away is brought back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qemu_prefault_lab.guest import Guest
from support.guest import faults
from support.process import leftovers

pytestmark = [pytest.mark.any_agent, pytest.mark.agents("attach", "qmp")]
MIB = 1 << 20
WORKLOAD_MIB = 32
PAGES = WORKLOAD_MIB << 8
MEMORY_MIB = 256
DIMM = 128 * MIB  # the least that Linux takes


class Follower:
    """A run of ``qemu-prefault --follow --json``."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        command = [sys.executable, "-m", "qemu_prefault", "--qmp", str(guest.qmp_path)]
        self.process = subprocess.Popen(
            [*command, "--follow", "--json"], stdout=subprocess.PIPE, text=True
        )

    def event(self) -> dict[str, Any]:
        """The next thing it tells."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it has ended with {self.process.wait()}"
        event: dict[str, Any] = json.loads(line)
        return event

    def until_complete(self) -> dict[str, Any]:
        """The run that left nothing to do."""
        while True:
            event = self.event()
            assert event["event"] == "prefaulted", event
            if self.guest.stats()["pages_4k"] << 12 >= event["bytes"]:
                assert event["remaining"] == 0
                return event

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def follow() -> Iterator[Callable[[Guest], Follower]]:
    followers: list[Follower] = []

    def start(guest: Guest) -> Follower:
        followers.append(Follower(guest))
        assert followers[-1].event()["why"] == "started"
        return followers[-1]

    yield start
    for follower in followers:
        follower.close()


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


def test_a_reset_guest_is_prefaulted_again(guest, follow):
    follower = follow(guest)
    guest.reset()
    guest.wait_ready()
    event = follower.until_complete()
    assert event["why"] == "the tables were dropped"
    before = faults(guest)
    assert guest.command("pass")["bad"] == 0
    assert faults(guest) - before <= PAGES / 100
    guest.qmp("quit")
    assert follower.process.wait(60) == 0


@pytest.mark.full
def test_a_dimm_that_comes_and_goes(guest, follow):
    follower = follow(guest)
    guest.qmp("object-add", **{"qom_type": "memory-backend-ram", "id": "d0", "size": DIMM})
    guest.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="d0")
    event = follower.until_complete()
    assert event["bytes"] >= DIMM
    assert guest.stats()["pages_4k"] << 12 >= (MEMORY_MIB - 1) * MIB + DIMM

    guest.qmp("device_del", id="dimm0")
    guest.wait_event("DEVICE_DELETED")
    guest.qmp("object-del", id="d0")
    event = follower.until_complete()
    assert event["why"] == "the tables were dropped"
    assert event["bytes"] < MEMORY_MIB * MIB
    assert guest.command("pass")["bad"] == 0
    assert guest.status() == "running"
    assert leftovers(guest.pid) == []
