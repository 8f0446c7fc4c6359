# SPDX-License-Identifier: GPL-2.0-or-later
"""Test, on any KVM, that a Linux guest keeps running and keeps its memory.

KVM does not support the ioctl before Linux 6.11 or with ``npt=0``. On such a KVM, the tests check
the error, the effect of ``--populate-only``, and that a refused run has no side effects.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_prefault.conformance import host_facts, runner, suite
from qemu_prefault.host.kvm import pre_fault_capability
from qemu_prefault_lab.guest import Guest
from support.guest import check_memory, faults, prefault
from support.process import leftovers

pytestmark = pytest.mark.conformance

OFFERED = pre_fault_capability().available is True
ALLOC_MIB = 64


def minor_faults(guest: Guest) -> int:
    """Return the number of QEMU's minor faults, including those in KVM_RUN."""
    fields = Path(f"/proc/{guest.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7])


@pytest.mark.parametrize("smp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_running_guest_keeps_memory(smp: int) -> None:
    with Guest(machine="microvm", memory_mib=192, workload_mib=16, smp=smp) as guest:
        guest.wait_ready()
        guest.command("run")
        for _ in range(3):
            before = guest.command("status")["passes"]
            result = prefault(guest)
            assert result.status == (0 if OFFERED else 4), result.stderr
            if not OFFERED:
                assert result.error["code"] == "no-capability"
            assert guest.status() == "running"
            while guest.command("status")["passes"] == before:
                pass  # the workload makes progress
        assert guest.command("stop")["bad"] == 0
        check_memory(guest)
        assert leftovers(guest.pid) == []


@pytest.mark.shadow_paging
@pytest.mark.skipif(OFFERED, reason="this KVM has KVM_PRE_FAULT_MEMORY")
def test_refusal_leaves_no_trace() -> None:
    with Guest(machine="microvm", memory_mib=192, workload_mib=16) as guest:
        guest.wait_ready()
        guest.qmp("stop")
        before = guest.stats()
        host_faults = minor_faults(guest)
        assert prefault(guest).status == 4
        after = guest.stats()
        for name in ("pages_4k", "pages_2m", "pages_1g", "pf_taken"):
            assert after[name] == before[name], name
        assert minor_faults(guest) - host_faults < 256
        guest.qmp("cont")
        check_memory(guest)


def host_faults_of_new_memory(populate: bool) -> tuple[int, int]:
    """Write 64 MiB of new memory in a guest, and return the host and stage-2 faults."""
    with Guest(machine="microvm", memory_mib=256) as guest:
        guest.wait_ready()
        if populate:
            result = prefault(guest, "--populate-only")
            assert result.status == 0, result.stderr
            assert result.report["bytes"]["populated"] > ALLOC_MIB << 20
        before = minor_faults(guest), faults(guest)
        guest.command(f"alloc {ALLOC_MIB}")
        after = minor_faults(guest), faults(guest)
        check_memory(guest)
    return after[0] - before[0], after[1] - before[1]


def test_populate_only_avoids_host_faults() -> None:
    pages = ALLOC_MIB << 8
    without, stage2_without = host_faults_of_new_memory(populate=False)
    populated, stage2 = host_faults_of_new_memory(populate=True)
    print(f"host faults: {without}, populated: {populated}; stage 2: {stage2_without}, {stage2}")
    # The guest's kernel used some of these pages while it booted.
    assert without >= pages / 2
    assert populated <= without / 10
    # --populate-only does not avoid stage-2 faults. Only the ioctl does.
    assert stage2 >= stage2_without / 2


@pytest.mark.full
def test_suite_beside_live_guest() -> None:
    """Check that the suite passes while a guest runs, and does not affect the guest."""
    this = host_facts.read_host_facts()
    cases = [case for case in suite.all_cases() if case.area in ("paging", "slots", "foreign")]
    with Guest(machine="microvm", memory_mib=128, workload_mib=16) as guest:
        guest.wait_ready()
        guest.command("run")
        results = runner.run(cases, this)
        assert [r.case.id for r in results if not r.outcome.expected] == []
        assert guest.status() == "running"
        answer = guest.command("stop")
        assert answer["bad"] == 0 and float(answer["passes"]) > 0
