# SPDX-License-Identifier: GPL-2.0-or-later
"""Test with KVM's counters that prefaulted guests take no stage-2 faults."""

from __future__ import annotations

import pytest

from qemu_prefault_lab.guest import Guest
from support.guest import OTHER_MIB, MakeGuest, faults, faults_of_pass, prefault, ram_checksum
from support.process import leftovers

pytestmark = pytest.mark.any_agent

ALL = (32 + OTHER_MIB - 1) << 20  # bytes of RAM in a default guest, without the firmware's RAM


def faults_of_first_pass(guest: Guest) -> int:
    """Resume the guest, let it write its workload, and return its stage-2 faults."""
    guest.qmp("cont")
    return faults_of_pass(guest)


@pytest.mark.every_kernel
@pytest.mark.ept
def test_restored_guest_takes_no_faults(make_restored_guest: MakeGuest) -> None:
    control = faults_of_first_pass(make_restored_guest(workload_mib=64))
    assert control >= 64 << 8  # at least one per page without prefaulting

    guest = make_restored_guest(workload_mib=64)
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert guest.status() == "paused"  # the run does not resume the guest
    assert result.report["seconds"]["paused"] == 0  # the guest was already paused
    assert faults_of_first_pass(guest) <= control / 1000
    assert leftovers(guest.pid) == []


def test_counters_match_requested_bytes(make_restored_guest: MakeGuest, agent: str) -> None:
    guest = make_restored_guest()
    result = prefault(guest)
    report = result.report
    assert report["stage2"]["before"] == {"4k": 0, "2m": 0, "1g": 0}
    assert report["stage2"]["after"]["4k"] * 4096 >= report["bytes"]["requested"]
    assert report["bytes"]["remaining"] == 0
    assert report["bytes"]["prefaulted"] == report["bytes"]["requested"] >= ALL
    assert report["stage2"]["after"]["4k"] == guest.stats()["pages_4k"]
    assert report["kernel"]["pre_fault_memory"] is True
    assert report["agent"] == agent


def test_second_run_is_noop(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    first = prefault(guest).report
    second = prefault(guest)
    assert second.status == 0
    assert second.report["bytes"]["populated"] == 0
    assert second.report["stage2"]["before"] == first["stage2"]["after"]
    assert second.report["stage2"]["after"] == first["stage2"]["after"]


def test_dry_run_changes_nothing(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    result = prefault(guest, "--dry-run")
    assert result.status == 0
    assert result.report["bytes"]["requested"] >= ALL
    assert guest.stats()["pages_4k"] == 0


def test_guest_memory_is_unchanged(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    before = ram_checksum(guest)
    assert prefault(guest, "--populate", "all").status == 0
    assert ram_checksum(guest) == before


def test_running_guest_stays_running(make_restored_guest: MakeGuest, agent: str) -> None:
    guest = make_restored_guest()
    guest.qmp("cont")
    guest.command("run")
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert guest.status() == "running"
    paused, prefaulting = (result.report["seconds"][key] for key in ("paused", "prefault"))
    if agent == "plugin":  # has prefault vCPUs
        assert paused == 0 < prefaulting
    else:
        assert paused >= prefaulting > 0
    assert guest.command("stop")["bad"] == 0
    assert leftovers(guest.pid) == []


@pytest.mark.full
def test_cont_resumes_paused_guest(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    assert prefault(guest, "--cont").status == 0
    assert guest.status() == "running"


def test_vcpus_share_work(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(smp=2)
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert faults_of_first_pass(guest) <= (32 << 8) / 1000


@pytest.mark.full
def test_single_vcpu(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(smp=2)
    assert prefault(guest, "--vcpus", "1").status == 0
    assert faults_of_first_pass(guest) <= (32 << 8) / 1000


def test_range(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    result = prefault(guest, "--range", "64M+16M", "--range", "96M+4096")
    assert result.status == 0
    assert result.report["bytes"]["requested"] == (16 << 20) + 4096
    assert guest.stats()["pages_4k"] == (16 << 20) // 4096 + 1


@pytest.mark.full
def test_max_bytes(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    result = prefault(guest, "--max-bytes", "10M")
    assert result.status == 0
    assert guest.stats()["pages_4k"] == (10 << 20) // 4096


@pytest.mark.parametrize(
    "chunk", ["4096", *(pytest.param(size, marks=pytest.mark.full) for size in ("128K", "64M"))]
)
def test_chunk_sizes(make_restored_guest: MakeGuest, chunk: str) -> None:
    guest = make_restored_guest()
    assert prefault(guest, "--chunk", chunk, "--range", "64M+24M").status == 0
    assert guest.stats()["pages_4k"] == (24 << 20) // 4096


def test_untouched_memory_is_populated() -> None:
    """Check that untouched memory is populated before it is prefaulted.

    Otherwise the ioctl would map the zero page, and every write would fault again.
    """
    with Guest(machine="microvm", memory_mib=128, workload_mib=64, paused=True) as guest:
        result = prefault(guest, "--cont")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] >= 80 << 20
        guest.wait_ready()
        # Without populating, the guest takes 16,384 faults, one for each page. Most of the
        # remaining faults are on device registers.
        assert faults(guest) < 1000


def test_resident_skips_untouched_memory() -> None:
    with Guest(machine="microvm", paused=True) as guest:
        result = prefault(guest, "--populate", "resident")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] == 0
        # Only the kernel image and the initramfs are present, because QEMU has loaded them.
        requested = result.report["bytes"]["requested"]
        assert 0 < requested < 100 << 20
        assert guest.stats()["pages_4k"] * 4096 == requested


@pytest.mark.full
def test_guest_before_firmware_is_warned_about() -> None:
    with Guest(machine="q35", paused=True) as guest:
        result = prefault(guest)
        assert result.status == 0
        assert "firmware-ahead" in result.warnings
        assert guest.status() == "prelaunch"


def test_populate_only_fills_no_stage2() -> None:
    with Guest(machine="microvm", paused=True) as guest:
        result = prefault(guest, "--populate-only")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] >= 300 << 20
        assert result.report["bytes"]["remaining"] == 0
        assert guest.stats()["pages_4k"] == 0
