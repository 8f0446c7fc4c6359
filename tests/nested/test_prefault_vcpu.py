# SPDX-License-Identifier: GPL-2.0-or-later
"""Test prefault vCPUs, which the plugin creates and which never run.

Prefault vCPUs fill the guest's stage-2 tables while the guest runs. ``pf_fixed`` counts the faults
in which KVM mapped a page. Other faults are accesses to device registers.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.host.procfs import thread_names
from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import (
    SNAPSHOT,
    MakePluginGuest,
    add_disk,
    check_memory,
    faults_of_pass,
    plug_dimm,
    plugin_guests,
    prefault,
    run_job,
    wait_migrated,
)

MIB = 1 << 20
full = pytest.mark.full  # runs only in make test-full
WORKLOAD_MIB = 64
#: A bound of the faults of a running nested guest on its own tables, which cannot be prefaulted.
NESTED_FAULTS = 64
TRACING = Path("/sys/kernel/tracing")


@pytest.fixture
def make_plugin_guest() -> Iterator[MakePluginGuest]:
    """Return a function that starts a guest and passes options to the plugin."""
    with plugin_guests(WORKLOAD_MIB, "vcpu=prefault") as start:
        yield start


class MasterClock:
    """Records when KVM enables or disables the guest's master clock."""

    def __enter__(self) -> MasterClock:
        if not (TRACING / "trace").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
        self._enable(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._enable(False)

    def _enable(self, on: bool) -> None:
        (TRACING / "trace").write_text("")
        (TRACING / "events/kvm/kvm_update_master_clock/enable").write_text(str(int(on)))

    def last(self) -> int:
        """Return whether the master clock was in use after the last update (1 or 0)."""
        found = re.findall(r"kvm_update_master_clock: masterclock (\d)", self.text())
        assert found, self.text()
        return int(found[-1])

    def text(self) -> str:
        return (TRACING / "trace").read_text()


def fixed(guest: Guest) -> int:
    """Return the number of faults in which KVM mapped a page."""
    return guest.stats()["pf_fixed"]


def wait_booted(guest: Guest) -> None:
    """Wait until the guest no longer waits for the plugin."""
    wait_for(lambda: not guest.control("status")["booting"], "the guest no longer waits")


def count_events(guest: Guest, name: str) -> int:
    return sum(event["event"] == name for event in guest.monitor.events)


@pytest.mark.every_kernel
@pytest.mark.parametrize(
    "machine", [pytest.param("pc", marks=full), "q35", pytest.param("microvm", marks=full)]
)
def test_boot_fixes_no_page(make_plugin_guest: MakePluginGuest, machine: str) -> None:
    guest = make_plugin_guest(machine=machine, workload_mib=256)
    guest.wait_ready()
    counts = guest.stats()
    status = guest.wait_kept()
    assert counts["pf_fixed"] == 0, (counts, status)
    wait_booted(guest)
    assert (status["counters"]["errors"], status["counters"]["stuck"]) == (0, 0)
    check_memory(guest)


@pytest.mark.every_kernel
def test_running_guest_is_prefaulted_without_a_pause(make_plugin_guest: MakePluginGuest) -> None:
    """Prefault a running guest whose memory is absent, while it writes to its workload."""
    guest = make_plugin_guest("keep=off", memory_mib=448)
    guest.wait_ready()
    wait_booted(guest)
    guest.command("run")
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert result.report["agent"] == "plugin"
    assert result.report["seconds"]["paused"] == 0
    assert result.report["bytes"]["remaining"] == 0
    assert guest.command("stop")["bad"] == 0
    before = fixed(guest)
    guest.command("alloc 256")
    assert fixed(guest) == before
    assert count_events(guest, "STOP") == 0
    check_memory(guest)


@full
def test_pause_while_the_guest_waits(make_plugin_guest: MakePluginGuest) -> None:
    """Pause the plugin while all vCPU threads populate memory before the first instruction."""
    guest = make_plugin_guest(smp=2, memory_mib=448, paused=True)
    guest.qmp("cont")
    assert guest.control("pause")["ok"]
    guest.wait_ready()
    status = guest.control("status")
    assert (status["held"], status["booting"]) == ("paused", False)
    assert status["counters"]["populated"] < 400 * MIB
    assert guest.control("resume")["ok"]
    guest.wait_kept()
    check_memory(guest)


@full
def test_rate(make_plugin_guest: MakePluginGuest) -> None:
    """Limit the plugin to 1 KiB per second, so that it processes one item of at most 8 MiB."""
    guest = make_plugin_guest("keep=off", "rate=1K", memory_mib=192)
    guest.wait_ready()
    guest.control("resume")
    while not guest.control("status")["counters"]["prefaulted"]:
        guest.command("echo idle")
    check_memory(guest)
    status = guest.control("status")
    assert status["counters"]["populated"] <= 8 * MIB
    assert status["pending"] > 100 * MIB


@pytest.mark.every_kernel
@pytest.mark.parametrize("quirk", [pytest.param("disable", marks=full), "keep"])
def test_deleted_slots(make_plugin_guest: MakePluginGuest, quirk: str) -> None:
    """Delete a memslot, after which the ioctl never ends on an obsolete root before Linux 6.15."""
    guest = make_plugin_guest(
        f"quirk={quirk}", machine="pc", memory="slots=2,maxmem=1G", workload_mib=32
    )
    guest.wait_ready()
    guest.wait_kept()
    plug_dimm(guest, 32 * MIB)
    guest.wait_kept()
    guest.qmp("device_del", id="dimm-d0")
    guest.wait_event("DEVICE_DELETED")
    status = guest.wait_kept()
    guest.control("prefault")
    status = guest.wait_kept()
    assert (status["counters"]["errors"], status["counters"]["stuck"]) == (0, 0)
    before = fixed(guest)
    check_memory(guest)
    assert fixed(guest) == before


@pytest.mark.every_kernel
@pytest.mark.parametrize("paging", [pytest.param(1, marks=full), 0])
def test_nested_guest_in_guest_mode(make_plugin_guest: MakePluginGuest, paging: int) -> None:
    """Prefault while the only vCPU runs a busy nested guest, with nested or shadow paging."""
    guest = make_plugin_guest("keep=off", kvm=True, memory_mib=320)
    guest.wait_ready()
    parameter = "ept" if Path("/sys/module/kvm_intel").exists() else "npt"
    guest.command(f"nest {parameter}={paging}")
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert result.warnings == set()
    assert result.report["seconds"]["paused"] == 0
    assert count_events(guest, "STOP") == 0
    before = fixed(guest)
    counted = guest.command("nest-count")["count"]
    guest.command("alloc 128")
    assert fixed(guest) - before <= NESTED_FAULTS
    while guest.command("nest-count")["count"] == counted:
        pass
    assert guest.command("nest-count")["running"] == 1
    check_memory(guest)


# --- what must not happen ---


@pytest.mark.every_kernel
@pytest.mark.parametrize("smp", [1, pytest.param(2, marks=full)])
def test_master_clock_is_kept(make_plugin_guest: MakePluginGuest, tmp_path: Path, smp: int) -> None:
    """Reset the guest and load a snapshot. QEMU then sets the TSC of each of its vCPUs."""
    with MasterClock() as clock:
        guest = make_plugin_guest(
            machine="q35", smp=smp, args=["-action", "reboot=reset"], memory_mib=160
        )
        guest.wait_ready()
        assert clock.last() == 1, clock.text()
        guest.reset()
        guest.wait_ready()
        assert clock.last() == 1, clock.text()
        add_disk(guest, tmp_path / "disk")
        run_job(guest, "snapshot-save", **SNAPSHOT)
        run_job(guest, "snapshot-load", **SNAPSHOT)
        guest.qmp("cont")
        check_memory(guest)
        assert clock.last() == 1, clock.text()


@full
@pytest.mark.parametrize("smp", [1, 2])
def test_restored_guest_keeps_master_clock(
    make_plugin_guest: MakePluginGuest, tmp_path: Path, smp: int
) -> None:
    saved = make_plugin_guest(machine="q35", smp=smp, memory_mib=160)
    saved.wait_ready()
    saved.save(tmp_path / "state")
    with MasterClock() as clock:
        guest = make_plugin_guest(
            machine="q35", smp=smp, memory_mib=160, incoming=tmp_path / "state", workload_mib=0
        )
        guest.wait_restored()
        guest.qmp("cont")
        check_memory(guest)
        assert guest.wait_kept()["prefault_vcpus"]
        assert clock.last() == 1, clock.text()


@full
@pytest.mark.parametrize(
    ("topology", "slots"), [("1,maxcpus=4", 3), ("2,sockets=2,cores=3,maxcpus=6", 4)]
)
def test_all_vcpus_can_be_plugged(
    make_plugin_guest: MakePluginGuest, topology: str, slots: int
) -> None:
    """Plug all vCPUs, whose ids the prefault vCPUs must not take."""
    guest = make_plugin_guest(machine="q35", cpu="qemu64", args=["-smp", topology])
    guest.wait_ready()
    ids = [vcpu["id"] for vcpu in guest.wait_kept()["prefault_vcpus"]]
    free = [c for c in guest.qmp("query-hotpluggable-cpus") if "qom-path" not in c]
    assert len(free) == slots
    for number, cpu in enumerate(free):
        guest.qmp("device_add", driver=cpu["type"], id=f"cpu{number}", **cpu["props"])
    status = guest.control("status")
    assert not {vcpu["id"] for vcpu in status["vcpus"]} & set(ids)
    check_memory(guest)
    for number in range(len(free)):
        guest.qmp("device_del", id=f"cpu{number}")
    check_memory(guest)


@pytest.mark.every_kernel
@pytest.mark.parametrize("vcpu", ["prefault", pytest.param("borrow", marks=full)])
def test_dirty_ring_stops_prefault(make_plugin_guest: MakePluginGuest, vcpu: str) -> None:
    """Migrate with a dirty ring, while the plugin and the tool are told to prefault.

    KVM would log the prefaulted pages in the ring of the vCPU that was used, and later writes to
    these pages would not be logged.
    """
    accel = "kvm,dirty-ring-size=4096"
    source = make_plugin_guest("keep=off", f"vcpu={vcpu}", accel=accel, memory_mib=192)
    source.wait_ready()
    target = make_plugin_guest(
        "keep=off", accel=accel, memory_mib=192, incoming="defer", workload_mib=0
    )
    path = target.qmp_path.parent / "migration"
    target.qmp("migrate-incoming", uri=f"unix:{path}")
    source.qmp("migrate-set-parameters", max_bandwidth=16 << 20)
    source.qmp("migrate", uri=f"unix:{path}")
    while source.qmp("query-migrate").get("status") != "active":
        pass
    assert source.control("resume")["ok"]
    assert source.control("status")["held"] == "dirty ring"
    assert prefault(source).status == 5
    assert source.control("prefault")["ok"]
    source.command("alloc 64")
    source.command("run 5")
    assert source.control("status")["counters"]["prefaulted"] == 0
    source.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
    wait_migrated(source)
    target.wait_event("RESUME")
    assert target.command("stop")["bad"] == 0
    check_memory(target)


@full
@pytest.mark.parametrize(("sandbox", "nice"), [("off", 10), ("on,resourcecontrol=deny", 0)])
def test_nice_value(make_plugin_guest: MakePluginGuest, sandbox: str, nice: int) -> None:
    """Check that the plugin does not call setpriority() if a seccomp filter may forbid it."""
    guest = make_plugin_guest(machine="microvm", args=["-sandbox", sandbox])
    guest.wait_ready()
    assert guest.wait_kept()["prefault_vcpus"]
    tids = [tid for tid, name in thread_names(guest.pid).items() if name == "prefault-vcpu"]
    check_memory(guest)
    wait_for(
        lambda: [os.getpriority(os.PRIO_PROCESS, tid) for tid in tids] == [nice],
        "the prefault thread's nice value",
    )


@full
def test_video_memory_does_not_stop_prefault(make_plugin_guest: MakePluginGuest) -> None:
    """Boot a guest with a dirty ring and with video memory, which QEMU always logs."""
    guest = make_plugin_guest(accel="kvm,dirty-ring-size=4096", args=["-device", "VGA"])
    guest.wait_ready()
    assert fixed(guest) == 0
    status = guest.wait_kept()
    assert status["held"] is None
    assert {slot["why"] for slot in status["slots"]} >= {"dirty logging"}
    check_memory(guest)


@full
def test_borrow(make_plugin_guest: MakePluginGuest) -> None:
    guest = make_plugin_guest("vcpu=borrow")
    guest.wait_ready()
    status: dict[str, Any] = guest.wait_kept()
    assert status["prefault_vcpus"] == []
    assert status["no_prefault_vcpus"] == "vcpu=borrow"
    before = fixed(guest)
    faults_of_pass(guest)
    assert fixed(guest) == before


@full
def test_no_free_id(make_plugin_guest: MakePluginGuest) -> None:
    """Start a guest whose vCPUs can have all ids that an xAPIC can have."""
    guest = make_plugin_guest(machine="q35", args=["-smp", "1,maxcpus=255"])
    guest.wait_ready()
    status = guest.wait_kept()
    assert status["no_prefault_vcpus"] == "no vCPU id is free"
    assert "the plugin cannot create prefault vCPUs" in guest.stderr
    check_memory(guest)
