# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool on hosts whose KVM does not support the ioctl.

These hosts run Linux before 6.11 (Debian 12) or use shadow paging (``npt=0`` or ``ept=0``). The
tool must refuse to prefault, but ``--populate-only`` must work. The tests are skipped if KVM offers
the ioctl.
"""

from __future__ import annotations

import pytest

from qemu_prefault.host.kvm import pre_fault_capability
from qemu_prefault_lab.guest import Guest, mmu
from support.guest import prefault, ram_resident
from support.process import leftovers
from support.tool import Tool

pytestmark = [
    pytest.mark.unsupported,
    pytest.mark.skipif(
        pre_fault_capability().available is True, reason="this KVM has KVM_PRE_FAULT_MEMORY"
    ),
]


def test_prefault_is_refused() -> None:
    with Guest(machine="microvm", memory_mib=128, paused=True) as guest:
        before = ram_resident(guest)
        result = prefault(guest)
        assert result.status == 4
        assert result.error["code"] == "no-capability"
        assert "--populate-only" in result.error["remedy"]
        if mmu() == "shadow":
            assert "shadow paging" in result.error["cause"]
        else:
            assert "KVM_CAP_PRE_FAULT_MEMORY" in result.error["cause"]
        assert ram_resident(guest) == before
        assert guest.status() == "prelaunch"
        assert leftovers(guest.pid) == []


def test_populate_only_on_running_guest() -> None:
    with Guest(machine="pc", memory_mib=192, workload_mib=16) as guest:
        guest.wait_ready()
        guest.command("run")
        result = prefault(guest, "--populate-only")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] > 64 << 20
        assert result.report["bytes"]["remaining"] == 0
        assert ram_resident(guest) >= 191 << 20
        assert guest.status() == "running"
        assert guest.command("stop")["bad"] == 0
        assert leftovers(guest.pid) == []


def test_probe_reports_missing_ioctl() -> None:
    with Guest(machine="microvm", memory_mib=128, paused=True) as guest:
        result = Tool(["probe", "--qmp", str(guest.qmp_path), "--json"]).finish()
        assert result.status == 4
        findings = {finding["check"]: finding for finding in result.report["findings"]}
        assert findings["kvm"]["verdict"] == "no"
        assert findings["kvm"]["remedy"]
        assert findings["attach"]["verdict"] == "ok"
        assert findings["populate"]["verdict"] == "ok"
