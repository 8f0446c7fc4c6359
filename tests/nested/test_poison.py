# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that all guest RAM except a poisoned page is prefaulted."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import SetThp, mapped_bytes, prefault, ram_hva, ram_resident

OFFLINE = Path("/sys/devices/system/memory/hard_offline_page")
MIB = 1 << 20
#: A guest-physical address that a booting guest does not access.
POISONED = 130 * MIB + 5 * 4096
PRESENT, PFN = 1 << 63, (1 << 55) - 1

pytestmark = pytest.mark.skipif(not OFFLINE.exists(), reason="the kernel lacks hard_offline_page")


def poison(guest: Guest, gpa: int) -> None:
    """Offline a page of the guest's RAM, as the kernel does after a memory error."""
    hva = ram_hva(guest) + gpa
    with open(f"/proc/{guest.pid}/mem", "rb+", buffering=0) as memory:
        os.pwrite(memory.fileno(), b"x", hva)  # make the page present
    with open(f"/proc/{guest.pid}/pagemap", "rb", buffering=0) as pagemap:
        (entry,) = struct.unpack("=Q", os.pread(pagemap.fileno(), 8, hva // 4096 * 8))
    assert entry & PRESENT
    OFFLINE.write_text(f"{(entry & PFN) << 12:#x}")


@pytest.mark.parametrize(
    ("huge", "options"),
    [
        (False, ()),
        pytest.param(True, (), marks=pytest.mark.full),
        pytest.param(True, ("--populate-only",), marks=pytest.mark.full),
    ],
)
def test_only_the_poisoned_page_is_left_out(
    set_thp: SetThp, huge: bool, options: tuple[str, ...]
) -> None:
    set_thp("always" if huge else "never")
    with Guest(memory_mib=256, paused=True) as guest:
        poison(guest, POISONED)
        result = prefault(guest, *options)
        assert result.status == 3, (result.stdout, result.stderr)
        counts = result.report["bytes"]
        assert counts["requested"] > 255 * MIB
        assert counts["remaining"] == 4096
        assert "4.0 KiB skipped: the memory has an uncorrected hardware error" in result.stdout
        if not options:
            assert mapped_bytes(guest) >= 254 * MIB
        assert guest.status() == "prelaunch"


@pytest.mark.full
def test_plugin_leaves_out_only_the_poisoned_page() -> None:
    # In prelaunch, the plugin has not prefaulted. It begins before the guest's first instruction.
    with Guest(memory_mib=256, paused=True, plugin=[]) as guest:
        poison(guest, POISONED)
        guest.qmp("cont")
        wait_for(lambda: not guest.control("status")["pending"], "the plugin is done", 120)
        assert guest.alive
        status = guest.control("status")
        # Firmware makes QEMU delete and re-create the slots, so compare the populated bytes.
        assert status["counters"]["errors"] == 1
        assert ram_resident(guest) >= 254 * MIB
