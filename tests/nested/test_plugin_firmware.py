# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin under UEFI firmware, which drops low RAM's tables in its own ways."""

from __future__ import annotations

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.machine import NO_UEFI, uefi_aborts

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
def test_uefi(machine):
    with boot(machine, None) as guest:
        guest.wait_ready(600)
        without = guest.stats()["pf_taken"]
    with boot(machine, []) as guest:
        guest.wait_ready(600)
        faults = guest.stats()["pf_taken"]
        print(f"UEFI on {machine}: {faults} of {without} faults")
        # The rest is MMIO, and what firmware touches before its slots have been quiet.
        assert faults <= 0.1 * without
        status = guest.wait_kept()
        assert status["counters"]["errors"] == 0
        assert guest.command("pass")["bad"] == 0
        before = guest.stats()["pf_taken"]
        guest.reset()
        guest.wait_ready(600)
        again = guest.stats()["pf_taken"] - before
        print(f"UEFI on {machine}, second boot: {again} faults")
        assert again <= 0.1 * without
        assert guest.command("pass")["bad"] == 0
