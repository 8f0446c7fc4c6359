# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure a guest's faults at each lifecycle event, for each way to prefault it.

A table of docs/usage/libvirt.md shows the results. The number of faults is KVM's ``pf_taken``. Each
guest writes 64 MiB of 4K pages, which causes 16,384 faults without prefaulting. The tests print
each row of the table as a line ``libvirt-table: MOMENT | ROUTE | FAULTS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Unpack

import pytest

from qemu_prefault.libvirt.install import HOOK as HOOK_FILE
from qemu_prefault_lab.libvirtd import LabDomain, Libvirtd, Syslog, host_namespace, wait_until
from support.guest import Follower
from support.libvirt import (
    MAX_RESIDUAL_FAULTS,
    PAGES,
    DomainOptions,
    MakeDomain,
    WriteHookConfig,
    apparmor_label,
    tool_output,
)

pytestmark = [pytest.mark.libvirt, pytest.mark.full]

NOTHING, PLUGIN, HOOK, COMMAND, FOLLOW = "nothing", "plugin", "hook", "command", "follow"
#: The last message of the run that the hook starts.
VERIFIED = "verified: all"


class ReportRow(Protocol):
    def __call__(self, moment: str, route: str, faults: int, note: str = "") -> None: ...


HookCalls = Callable[[], list[str]]


@pytest.fixture
def report_row(capsys: pytest.CaptureFixture[str]) -> ReportRow:
    """Return a function that prints a row of the table."""

    def report(moment: str, route: str, faults: int, note: str = "") -> None:
        with capsys.disabled():
            print(f"\nlibvirt-table: {moment} | {route} | {faults:,} | {note}")

    return report


def make_routed_domain(
    make_domain: MakeDomain, route: str, name: str, **options: Unpack[DomainOptions]
) -> LabDomain:
    """Make a domain.

    If the route is ``plugin``, enable the plugin in it.
    """
    guest = make_domain(name, **options)
    if route == PLUGIN:
        tool_output("libvirt", "enable", name)
    return guest


@pytest.fixture
def hook_calls() -> Iterator[HookCalls]:
    """Return a function that lists libvirt's calls of hooks.

    An extra hook logs them.
    """
    script = Path("/") / HOOK_FILE.with_name("99-calls")
    log = Path("/run/hook-calls")
    log.write_text("")
    script.write_text(f'#!/bin/sh\necho "$2 $3" >>{log}\n')
    script.chmod(0o755)

    def calls() -> list[str]:
        return log.read_text().splitlines()

    yield calls
    script.unlink()
    log.unlink()


def start_timed(guest: LabDomain, route: str) -> float:
    """Start the domain with the route's command and return the elapsed seconds."""
    began = time.monotonic()
    if route == COMMAND:
        tool_output("libvirt", "start", guest.name)
    else:
        guest.virsh("start")
    seconds = time.monotonic() - began
    guest.attach_serial()
    return seconds


def check_nothing_left_to_fault(guest: LabDomain, mib: int) -> None:
    """Check that the guest takes no faults when it writes new memory.

    :param mib: The MiB to write.
    """
    before = guest.faults()
    guest.command(f"alloc {mib}")
    assert guest.faults() - before < MAX_RESIDUAL_FAULTS


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_cold_start(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
    route: str,
) -> None:
    guest = make_routed_domain(make_domain, route, f"cold-{route}")
    if route == HOOK:
        write_hook_config('[default]\nstart = "later"\n')
    seconds = start_timed(guest, route)
    guest.wait_ready()
    report_row("cold start", route, guest.faults(), f"start {seconds:.2f} s")
    if route == HOOK:
        # The hook is called after the vCPUs have started, so the guest takes some faults before
        # the hook's run.
        assert guest.faults() > MAX_RESIDUAL_FAULTS
        wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
        check_nothing_left_to_fault(guest, 96)
        return
    assert (guest.faults() > PAGES) is (route != PLUGIN)
    assert route != PLUGIN or guest.faults() < MAX_RESIDUAL_FAULTS


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_managed_save(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
    route: str,
) -> None:
    guest = make_routed_domain(make_domain, route, f"saved-{route}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    guest.virsh("managedsave")
    if route == HOOK:
        write_hook_config('[default]\nrestore = "now"\n')
    seconds = start_timed(guest, route)
    guest.check_memory()
    report_row("restore", route, guest.faults(), f"start {seconds:.2f} s")
    assert (guest.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or guest.faults() < MAX_RESIDUAL_FAULTS, syslog.lines()


def test_restore_saved_file(make_domain: MakeDomain, report_row: ReportRow, tmp_path: Path) -> None:
    guest = make_domain("file")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    file = tmp_path / "saved"
    guest.virsh("save", str(file))
    tool_output("libvirt", "restore", str(file))
    guest.attach_serial()
    guest.check_memory()
    report_row("restore of a file", COMMAND, guest.faults())
    assert guest.faults() < MAX_RESIDUAL_FAULTS


def test_hook_latency(
    libvirtd: Libvirtd, write_hook_config: WriteHookConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print the durations of the hook's calls, because libvirt waits for the hook."""
    plain = "<domain type='kvm'><name>a</name><uuid>u</uuid><memory>1024</memory></domain>"
    asked = plain.replace("<name>", "<!-- qemu-prefault --><name>")

    def seconds(operation: str, xml: str) -> float:
        times: list[float] = []
        for _ in range(5):
            began = time.monotonic()
            subprocess.run(
                [Path("/") / HOOK_FILE, "a", operation, "begin", "-"],
                input=xml, text=True, check=True, stderr=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
            times.append(time.monotonic() - began)
        return statistics.median(times)

    with capsys.disabled():
        for what, operation, xml in (
            ("an operation that the hook ignores", "prepare", plain),
            ("a domain without a configuration", "started", plain),
            ("a domain whose configuration is off", "started", asked),
        ):
            print(f"\nlibvirt-latency: {what} | {seconds(operation, xml) * 1000:.0f} ms")


def faults_of_reset(guest: LabDomain) -> int:
    before = guest.faults()
    guest.reset()
    guest.wait_ready()
    return guest.faults() - before


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, FOLLOW])
def test_reset(make_domain: MakeDomain, report_row: ReportRow, route: str) -> None:
    guest = make_routed_domain(make_domain, route, f"reset-{route}")
    guest.start()
    guest.wait_ready()
    with (
        Follower("--domain", guest.name)
        if route == FOLLOW
        else contextlib.nullcontext() as follower
    ):
        faults = faults_of_reset(guest)
        report_row("reset", route, faults)
        if follower is not None:
            assert follower.prefaulted()["why"] == "the tables were dropped"
            check_nothing_left_to_fault(guest, 96)
    assert (faults > MAX_RESIDUAL_FAULTS) is (route != PLUGIN)
    assert route != NOTHING or faults > PAGES


def test_reset_does_not_call_hook(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    hook_calls: HookCalls,
    report_row: ReportRow,
) -> None:
    """Check that a reset causes faults, because libvirt does not call the hook."""
    guest = make_domain(f"reset-{HOOK}")
    write_hook_config('[default]\nstart = "later"\n')
    guest.start()
    guest.wait_ready()
    wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
    calls = hook_calls()
    assert "started begin" in calls
    faults = faults_of_reset(guest)
    report_row("reset", HOOK, faults)
    assert hook_calls() == calls
    assert faults > PAGES


DIMM = """<memory model='dimm'>
  <target><size unit='MiB'>256</size><node>0</node></target>
</memory>
"""


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, COMMAND, FOLLOW])
def test_hotplug(
    make_domain: MakeDomain,
    hook_calls: HookCalls,
    report_row: ReportRow,
    route: str,
    tmp_path: Path,
) -> None:
    guest = make_routed_domain(
        make_domain,
        route,
        f"plug-{route}",
        memory_mib=256,
        workload_mib=0,
        max_mib=1024,
        kernel_args="memhp_default_state=online",
    )
    guest.start()
    guest.wait_ready()
    file = tmp_path / "dimm.xml"
    file.write_text(DIMM)
    calls = hook_calls()
    with (
        Follower("--domain", guest.name)
        if route == FOLLOW
        else contextlib.nullcontext() as follower
    ):
        with expect_acpi_ost(guest):
            guest.virsh("attach-device", str(file), "--live")
        if route == COMMAND:
            tool_output("--domain", guest.name, "--range", "4G+256M")
        if route == PLUGIN:
            wait_until(lambda: not plugin_status(guest)["pending"], "the plugin has finished")
        if follower is not None:
            assert follower.prefaulted()["why"] == "memory was added"
        before = guest.faults()
        guest.command("alloc 320")  # more than the guest's memory without the DIMM
        faults = guest.faults() - before
    report_row("hotplug", route, faults)
    assert hook_calls() == calls
    least = {NOTHING: 256 * 256, COMMAND: MAX_RESIDUAL_FAULTS}.get(route, 0)
    most = {NOTHING: 321 * 256, COMMAND: 128 * 256}.get(route, MAX_RESIDUAL_FAULTS)
    assert least <= faults <= most


def plugin_status(guest: LabDomain) -> dict[str, Any]:
    status = json.loads(tool_output("libvirt", "status", guest.name, "--json"))
    plugin: dict[str, Any] = status["plugin"]
    return plugin


@contextlib.contextmanager
def expect_acpi_ost(guest: LabDomain) -> Iterator[None]:
    """Check that QEMU reports the guest's ACPI _OST for a plugged device."""
    waiting = subprocess.Popen(
        ["virsh", "-c", guest.daemon.uri, "qemu-monitor-event", guest.name, "--event",
         "ACPI_DEVICE_OST", "--timeout", "60"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield
    events, _ = waiting.communicate(timeout=90)
    assert "ACPI_DEVICE_OST" in events


@pytest.fixture(scope="module")
def other_host(libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    with Libvirtd(host="other") as started:
        yield started


MIGRATE = ("--persistent", "--migrateuri", "tcp://127.0.0.1:49152")


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, COMMAND])
def test_migration(
    make_domain: MakeDomain, other_host: Libvirtd, report_row: ReportRow, route: str
) -> None:
    guest = make_routed_domain(make_domain, route, f"move-{route}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    there = guest.daemon
    if route == COMMAND:
        os.environ["LIBVIRT_DEFAULT_URI"] = other_host.uri
        try:
            tool_output(
                *("libvirt", "migrate", guest.name, "--from", there.uri),
                *("--migrate-uri", MIGRATE[-1], "--persistent"),
            )
        finally:
            del os.environ["LIBVIRT_DEFAULT_URI"]
    else:
        guest.virsh("migrate", "--live", *MIGRATE, "--desturi", other_host.uri)
    arrived = guest.moved_to(other_host)
    arrived.attach_serial()
    wait_until(lambda: arrived.state == "running", "the guest runs on the destination")
    arrived.check_memory()
    report_row("migration", route, arrived.faults())
    assert (arrived.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or arrived.faults() < MAX_RESIDUAL_FAULTS
    assert apparmor_label(arrived) == f":{host_namespace('other')}:libvirt-{guest.uuid} (enforce)"


def test_hook_prefaults_after_migration(
    make_domain: MakeDomain,
    other_host: Libvirtd,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
) -> None:
    """Check that the run which the hook starts waits until the guest has arrived.

    libvirt calls the hook before QEMU has loaded the guest's RAM. libvirt lets a client wait for a
    busy domain for at most 30 s, but the run must wait longer.
    """
    guest = make_domain("move-hook")
    guest.start()
    guest.wait_ready()
    write_hook_config('[default]\nmigrate = "later"\n')
    guest.command("run")  # write all of the workload's memory repeatedly, on both hosts
    guest.virsh(
        *("migrate", "--live", *MIGRATE, "--desturi", other_host.uri),
        *("--bandwidth", "4", "--timeout", "80", "--timeout-suspend"),
    )
    arrived = guest.moved_to(other_host)
    arrived.attach_serial()
    wait_until(lambda: arrived.state == "running", "the guest runs on the destination")

    def passes() -> float:
        return float(arrived.command("status")["passes"])

    before = passes()
    wait_until(lambda: passes() > before, "the guest writes on the destination")
    report_row("migration", HOOK, arrived.faults())
    assert arrived.faults() > MAX_RESIDUAL_FAULTS
    wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
    assert syslog.lines("move-hook is migrating in"), syslog.lines()
    assert arrived.command("stop")["bad"] == 0
    check_nothing_left_to_fault(arrived, 64)
