# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin with UEFI, which changes memslots differently from SeaBIOS."""

from __future__ import annotations

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.machine import NO_UEFI, uefi_aborts
from support.guest import check_memory, faults

pytestmark = [
    pytest.mark.firmware,
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


@pytest.mark.parametrize("machine", ["q35,smm=off", "q35"])
def test_uefi(machine: str) -> None:
    with boot(machine, None) as guest:
        guest.wait_ready(600)
        without = faults(guest)
    with boot(machine, []) as guest:
        guest.wait_ready(600)
        taken = faults(guest)
        print(f"UEFI on {machine}: {taken} of {without} faults")
        # The other faults are on device registers, and on memory that the firmware accesses before
        # it has finished changing memslots.
        assert taken <= 0.1 * without
        status = guest.wait_kept()
        assert status["counters"]["errors"] == 0
        check_memory(guest)
        before = faults(guest)
        guest.reset()
        guest.wait_ready(600)
        again = faults(guest) - before
        print(f"UEFI on {machine}, second boot: {again} faults")
        assert again <= 0.1 * without
        check_memory(guest)
