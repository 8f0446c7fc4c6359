# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin with UEFI, which changes memslots differently from SeaBIOS."""

from __future__ import annotations

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.machine import NO_UEFI, uefi_aborts
from qemu_prefault_lab.wait import wait_for
from support.guest import check_memory

pytestmark = [
    pytest.mark.firmware,
    pytest.mark.full,
    pytest.mark.skipif(uefi_aborts(), reason=NO_UEFI),
]
WORKLOAD_MIB = 256
#: The bound of the faults of a boot, as a share of those without the plugin.
MOST_FAULTS = 0.0005


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
        without = guest.stats()["pf_fixed"]
    with boot(machine, []) as guest:
        guest.wait_ready(600)
        taken = guest.stats()
        print(f"UEFI on {machine}: {taken['pf_fixed']} of {without} faults on memory")
        # 32 of these faults are on the option ROM area, whose pages are absent, and some on the
        # memory that OVMF accesses right after it has closed TSEG.
        assert taken["pf_fixed"] <= MOST_FAULTS * without, taken
        status = guest.wait_kept()
        assert (status["counters"]["errors"], status["counters"]["stuck"]) == (0, 0)
        # UEFI changes no more slots, so the guest must not wait for the plugin any longer.
        wait_for(lambda: not guest.control("status")["booting"], "the guest no longer waits")
        check_memory(guest)
        before = guest.stats()["pf_fixed"]
        guest.reset()
        guest.wait_ready(600)
        again = guest.stats()["pf_fixed"] - before
        print(f"UEFI on {machine}, second boot: {again} faults on memory")
        assert again <= MOST_FAULTS * without
        check_memory(guest)
