# SPDX-License-Identifier: GPL-2.0-or-later
"""Test guests that run a nested guest.

While a vCPU runs a nested guest, KVM has the nested guest's page tables loaded. These tests use
another level of the lab: L1 runs the prefaulted guest (L2), which runs an L3 guest. The L3 guest
increments a counter in memory in an endless loop.
"""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import Protocol, Unpack

import pytest

import qemu_prefault.engine.guest_mode
from qemu_prefault import connect
from qemu_prefault.engine.guest_mode import GuestMode
from qemu_prefault_lab.guest import Guest, defaults
from qemu_prefault_lab.wait import wait_for
from support.guest import (
    OTHER_MIB,
    GuestOptions,
    MakeGuest,
    faults_of_pass,
    prefault,
    start_incoming_tool,
    start_tool,
)
from support.process import leftovers, wait_clean
from support.tool import Result

pytestmark = pytest.mark.any_agent

WORKLOAD_MIB = 32
PAGES = WORKLOAD_MIB << 8  # the workload's pages, which the restored guest has not touched
#: The maximum number of stops. About two of three stops find a vCPU in guest mode (workload.c).
STOP_ATTEMPTS = 200
KILLS = 8


class MakeNestedGuest(Protocol):
    def __call__(self, npt: bool, **options: Unpack[GuestOptions]) -> Guest: ...


@pytest.fixture
def make_nested_guest(make_restored_guest: MakeGuest) -> MakeNestedGuest:
    """Return a function that restores a guest and starts an L3 in it."""

    def start(npt: bool, **options: Unpack[GuestOptions]) -> Guest:
        options["kvm"] = True
        if defaults.plugin is not None:  # prefault vCPUs are never in guest mode
            options["plugin"] = [*defaults.plugin, "vcpu=borrow"]
        guest = make_restored_guest(**options)
        guest.qmp("cont")
        # The guest has the same kind of CPU as this host.
        parameter = "ept" if Path("/sys/module/kvm_intel").exists() else "npt"
        guest.command(f"nest {parameter}={int(npt)}")
        return guest

    return start


#: Nested paging (NPT or EPT), which only ``make test-full`` tests, and shadow paging.
both_paging_modes = pytest.mark.parametrize(
    "npt",
    [pytest.param(True, id="npt", marks=pytest.mark.full), pytest.param(False, id="shadow")],
)


def in_guest_mode(guest: Guest) -> int:
    """Return the number of vCPUs that currently run the L3."""
    return guest.stats()["guest_mode"]


def stop_in_guest_mode(guest: Guest, wanted: int = 1) -> None:
    """Stop the guest repeatedly until the wanted number of vCPUs is in guest mode."""
    for _ in range(STOP_ATTEMPTS):
        guest.qmp("stop")
        if in_guest_mode(guest) == wanted:
            return
        guest.qmp("cont")
    pytest.fail(f"none of {STOP_ATTEMPTS} stops found {wanted} vCPUs in guest mode")


def check_guest_runs(guest: Guest, *, prefaulted: bool) -> None:
    """Check that the guest and its L3 run, and that the guest's memory is unchanged.

    :param prefaulted: False if the guest must take a fault for each page of the workload.
    """
    first = guest.command("nest-count")
    assert first["running"] == 1, first
    taken = faults_of_pass(guest)
    if prefaulted:
        assert taken < PAGES / 16
    else:
        assert taken >= PAGES
    while guest.command("nest-count")["count"] == first["count"]:
        pass
    assert guest.command("nest-count")["running"] == 1
    assert leftovers(guest.pid) == []


def guest_mode_warning(result: Result) -> str:
    warnings: list[dict[str, str]] = result.report["warnings"]
    return next(w["text"] for w in warnings if w["code"] == "guest-mode")


def any_section_skipped(result: Result, text: str) -> bool:
    """Return whether the run skipped a section for a reason that contains the text."""
    return any(text in (section["skipped"] or "") for section in result.report["sections"])


def mapped_pages(guest: Guest) -> int:
    return guest.stats()["pages_4k"]


def test_paused_npt_guest_is_not_prefaulted(make_nested_guest: MakeNestedGuest) -> None:
    """Check the warning if the ioctl fails with EOPNOTSUPP because of guest mode."""
    guest = make_nested_guest(npt=True)
    stop_in_guest_mode(guest)
    before = mapped_pages(guest)
    result = prefault(guest)
    assert result.status == 3, result.stderr
    assert guest.status() == "paused"
    assert result.report["bytes"]["prefaulted"] == 0
    assert result.report["bytes"]["remaining"] == result.report["bytes"]["requested"] > 0
    assert result.report["seconds"]["paused"] == 0
    assert result.warnings == {"guest-mode"}
    assert "every vCPU ran a nested guest" in guest_mode_warning(result)
    assert "--cont" in guest_mode_warning(result)
    # If populating replaces a mapped zero page, KVM unmaps the page.
    assert mapped_pages(guest) <= before and in_guest_mode(guest) == 1
    guest.qmp("cont")
    check_guest_runs(guest, prefaulted=False)


def test_paused_shadow_guest_fills_guest_mode_tables(
    make_nested_guest: MakeNestedGuest, agent: str
) -> None:
    """Check that filling the tables used in guest mode does not count as prefaulting.

    The ioctl succeeds, but fills the tables that the vCPU uses in guest mode. A patched QEMU
    detects guest mode from kvm_run and does not issue the ioctl.
    """
    guest = make_nested_guest(npt=False)
    stop_in_guest_mode(guest)
    before = mapped_pages(guest)
    result = prefault(guest)
    assert result.status == 3, result.stderr
    report = result.report
    assert report["bytes"]["remaining"] == report["bytes"]["requested"]
    if agent == "qmp":
        assert mapped_pages(guest) <= before and report["bytes"]["prefaulted"] == 0
        assert "every vCPU ran a nested guest" in guest_mode_warning(result)
    else:
        # The L3 has touched few pages, so nearly all leaves of its tables are new.
        assert mapped_pages(guest) - before > 0.9 * report["bytes"]["requested"] / 4096
        assert report["stage2"]["after"]["4k"] == mapped_pages(guest)
        assert report["bytes"]["prefaulted"] == report["bytes"]["requested"]
        assert "not the guest's own" in guest_mode_warning(result)
    guest.qmp("cont")
    check_guest_runs(guest, prefaulted=False)


@pytest.mark.full
@both_paging_modes
def test_running_guest_is_stopped_outside_guest_mode(
    make_nested_guest: MakeNestedGuest, npt: bool
) -> None:
    guest = make_nested_guest(npt)
    tried: set[bool] = set()
    while len(tried) < 2:  # until one run needed one stop, and another run several
        result = prefault(guest)
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["remaining"] == 0
        assert result.report["stage2"]["after"]["4k"] * 4096 >= result.report["bytes"]["requested"]
        assert 0 < result.report["seconds"]["paused"] < result.report["seconds"]["total"]
        assert result.warnings <= {"guest-mode"}
        tried.add("guest-mode" in result.warnings)
        assert guest.status() == "running"
        check_guest_runs(guest, prefaulted=True)


@pytest.mark.full
@both_paging_modes
def test_cont_leaves_guest_mode(make_nested_guest: MakeNestedGuest, npt: bool) -> None:
    guest = make_nested_guest(npt)
    stop_in_guest_mode(guest)
    result = prefault(guest, "--cont")
    assert result.status == 0, result.stderr
    assert "resumed the guest and stopped it again" in guest_mode_warning(result)
    assert guest.status() == "running"
    check_guest_runs(guest, prefaulted=True)


@pytest.mark.full
@both_paging_modes
def test_incoming_guest_with_nested_guest(
    make_nested_guest: MakeNestedGuest, npt: bool, tmp_path: Path
) -> None:
    """Check that a guest is prefaulted even whose vCPU is in guest mode."""
    source = make_nested_guest(npt)
    uri = f"unix:{tmp_path / 'migration'}"
    with Guest(memory_mib=WORKLOAD_MIB + OTHER_MIB, kvm=True, incoming=uri) as target:
        tool = start_incoming_tool(target)
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
        source.qmp("migrate", uri=uri)
        result = tool.finish()
        assert result.status == 0, (result.stdout, result.stderr)
        assert result.report["bytes"]["remaining"] == 0
        assert result.warnings <= {"guest-mode"}
        assert target.status() == "running"
        check_guest_runs(target, prefaulted=True)


@pytest.mark.full
def test_guest_mode_from_stats_fd(make_nested_guest: MakeNestedGuest) -> None:
    guest = make_nested_guest(npt=True)

    async def look() -> list[int]:
        async with connect(str(guest.qmp_path)) as vm:
            threads = await vm.vcpu_threads([], needs_fds=True)
            with vm.vcpu_stats(threads) as stats:
                assert stats is not None
                return [vcpu.read("guest_mode")[0] for vcpu in stats]

    for wanted in (0, 1):
        stop_in_guest_mode(guest, wanted)
        assert asyncio.run(look()) == [wanted]
        guest.qmp("cont")


@pytest.mark.full
@both_paging_modes
def test_vcpu_outside_guest_mode_is_used(make_nested_guest: MakeNestedGuest, npt: bool) -> None:
    guest = make_nested_guest(npt, smp=2)
    stop_in_guest_mode(guest)
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert guest.status() == "paused"
    assert result.report["bytes"]["remaining"] == 0
    assert result.warnings == {"vcpu-unusable"}
    assert not any_section_skipped(result, "prefault")
    guest.qmp("cont")
    check_guest_runs(guest, prefaulted=True)


@pytest.mark.full
@both_paging_modes
def test_retries_are_bounded(
    make_nested_guest: MakeNestedGuest, npt: bool, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allow only one stop, so that most runs find a vCPU in guest mode and fail."""
    monkeypatch.setattr(qemu_prefault.engine.guest_mode, "GUEST_MODE_TRIES", 1)
    guest = make_nested_guest(npt)
    verified = False
    while (result := prefault(guest)).status == 0:
        verified = True
        assert guest.status() == "running"
    assert result.status == 3, result.stderr
    assert guest.status() == "running"
    assert "stopped once" in guest_mode_warning(result)
    # In guest mode, the patched QEMU's job prefaults nothing. The ioctl fails only with nested
    # paging.
    nothing_done = npt or agent == "qmp"
    assert (result.report["bytes"]["prefaulted"] == 0) == nothing_done
    check_guest_runs(guest, prefaulted=verified)


@pytest.mark.full
def test_ioctl_detects_guest_mode(
    make_nested_guest: MakeNestedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the tool detects guest mode from EOPNOTSUPP, without a counter.

    If the tool cannot read KVM's ``guest_mode`` counter, each attempt issues the ioctl for all
    memory, which takes a second in the lab. The test raises the time limit to allow enough
    attempts.
    """

    async def nothing(*_: object) -> set[int]:
        return set()

    monkeypatch.setattr(GuestMode, "workers", nothing)
    monkeypatch.setattr(qemu_prefault.engine.guest_mode, "GUEST_MODE_SECONDS", 1_000_000.0)
    guest = make_nested_guest(npt=True)
    stop_in_guest_mode(guest)
    result = prefault(guest)
    assert result.status == 3 and result.warnings == {"guest-mode"}, result.stderr
    assert result.report["bytes"]["prefaulted"] == 0
    assert any_section_skipped(result, "no vCPU")
    result = prefault(guest, "--cont")
    assert result.status == 0, result.stderr
    assert not any_section_skipped(result, "no vCPU")
    assert "resumed the guest and stopped it again" in guest_mode_warning(result)
    check_guest_runs(guest, prefaulted=True)


@pytest.mark.full
def test_guest_runs_if_tool_dies_between_stops(
    make_nested_guest: MakeNestedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the tool after several stops: each pause needs its own resume guard."""

    async def always(*_: object) -> set[int]:
        return {0}

    guest = make_nested_guest(npt=True)
    monkeypatch.setattr(GuestMode, "workers", always)
    monkeypatch.setattr(qemu_prefault.engine.guest_mode, "GUEST_MODE_TRIES", 1_000_000)
    monkeypatch.setattr(qemu_prefault.engine.guest_mode, "GUEST_MODE_SECONDS", 1_000_000.0)
    for _ in range(KILLS):
        tool = start_tool(guest)
        for name in ["STOP", "RESUME"] * random.randint(1, 4) + ["STOP"] * random.randint(0, 1):
            guest.wait_event(name)
        tool.send_signal(signal.SIGKILL)
        wait_clean(guest.pid)
        wait_for(lambda: guest.status() == "running", "the guest runs again")
    check_guest_runs(guest, prefaulted=False)


@both_paging_modes
@pytest.mark.agents("attach")  # this test loads the plugin itself
def test_plugin_leaves_guest_mode(make_nested_guest: MakeNestedGuest, npt: bool) -> None:
    """Check that the plugin makes a vCPU leave guest mode to prefault."""
    guest = make_nested_guest(npt, plugin=["keep=off", "populate=resident", "vcpu=borrow"])
    stop_in_guest_mode(guest)
    guest.qmp("cont")
    guest.control("resume")
    wait_for(lambda: not guest.control("status")["pending"], "nothing left to prefault")
    counters = guest.control("status")["counters"]
    assert counters["prefaulted"] > PAGES << 12 and counters["errors"] == 0, counters
    check_guest_runs(guest, prefaulted=True)
