# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin under UEFI firmware, which drops low RAM's tables in its own ways."""

from __future__ import annotations

import pytest

from qemu_prefault.lab.guest import Guest
from qemu_prefault.lab.machine import NO_UEFI, is_emulated

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(is_emulated(), reason=NO_UEFI),
]
WORKLOAD_MIB = 256


def boot(plugin: list[str] | None) -> Guest:
    return Guest(
        machine="q35,smm=off",
        memory_mib=448,
        kernel="vmlinuz",
        ovmf=True,
        plugin=plugin,
        workload_mib=WORKLOAD_MIB,
        args=["-action", "reboot=reset"],
    )


def test_uefi():
    with boot(None) as guest:
        guest.wait_ready(600)
        without = guest.stats()["pf_taken"]
    with boot([]) as guest:
        guest.wait_ready(600)
        faults = guest.stats()["pf_taken"]
        print(f"UEFI: {faults} of {without} faults")
        # The rest is what firmware and drivers ask of devices (MMIO).
        assert faults <= 0.1 * without
        status = guest.wait_kept()
        assert status["counters"]["errors"] == 0
        assert guest.command("pass")["bad"] == 0
        before = guest.stats()["pf_taken"]
        guest.reset()
        guest.wait_ready(600)
        again = guest.stats()["pf_taken"] - before
        print(f"UEFI, second boot: {again} faults")
        assert again <= 0.1 * without
        assert guest.command("pass")["bad"] == 0
