# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin under UEFI firmware, which drops low RAM's tables in its own ways."""

from __future__ import annotations

import pytest

from qemu_prefault.lab.guest import Guest
from qemu_prefault.lab.machine import NO_UEFI, uefi_aborts

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(uefi_aborts(), reason=NO_UEFI),
]
WORKLOAD_MIB = 256


def boot(machine: str, plugin: list[str] | None) -> Guest:
    return Guest(
        machine=machine,
        memory_mib=448,
        kernel="vmlinuz",
        ovmf=True,
        plugin=plugin,
        workload_mib=WORKLOAD_MIB,
        args=["-action", "reboot=reset"],
    )


def memory_faults(guest: Guest) -> int:
    """What is left are accesses of firmware and drivers to devices."""
    stats = guest.stats()
    print(f"{stats['pf_taken']} faults, {stats['pf_emulate']} of them on devices")
    return stats["pf_taken"] - stats["pf_emulate"]


@pytest.mark.parametrize("machine", ["q35,smm=off", "q35"])
def test_uefi(machine):
    with boot(machine, None) as guest:
        guest.wait_ready(600)
        without = memory_faults(guest)
    with boot(machine, []) as guest:
        guest.wait_ready(600)
        assert memory_faults(guest) <= 0.1 * without
        status = guest.wait_kept()
        assert status["counters"]["errors"] == 0
        assert guest.command("pass")["bad"] == 0
        before = memory_faults(guest)
        guest.reset()
        guest.wait_ready(600)
        assert memory_faults(guest) - before <= 0.1 * without
        assert guest.command("pass")["bad"] == 0
