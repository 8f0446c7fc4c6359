# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure faults at each lifecycle event, with each method of prefaulting.

docs/usage/libvirt.md shows the results in a table. The number of faults is KVM's ``pf_taken``. Each
guest writes 64 MiB of 4K pages, which causes 16,384 faults without prefaulting. The tests print
each value of the table in a line ``libvirt-table: EVENT | METHOD | FAULTS | NOTE``.
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
    def __call__(self, event: str, method: str, faults: int, note: str = "") -> None: ...


HookCalls = Callable[[], list[str]]


@pytest.fixture
def report_row(capsys: pytest.CaptureFixture[str]) -> ReportRow:
    """Return a function that prints one value of the table."""

    def report(event: str, method: str, faults: int, note: str = "") -> None:
        with capsys.disabled():
            print(f"\nlibvirt-table: {event} | {method} | {faults:,} | {note}")

    return report


def make_prepared_domain(
    make_domain: MakeDomain, method: str, name: str, **options: Unpack[DomainOptions]
) -> LabDomain:
    """Define a domain, and enable the plugin in it if the method is ``plugin``."""
    guest = make_domain(name, **options)
    if method == PLUGIN:
        tool_output("libvirt", "enable", name)
    return guest


@pytest.fixture
def hook_calls() -> Iterator[HookCalls]:
    """Log libvirt's calls to hooks, and return a function that lists the calls."""
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


def start_timed(guest: LabDomain, method: str) -> float:
    """Start the domain with the method's command and return the elapsed seconds."""
    began = time.monotonic()
    if method == COMMAND:
        tool_output("libvirt", "start", guest.name)
    else:
        guest.virsh("start")
    seconds = time.monotonic() - began
    guest.attach_serial()
    return seconds


def check_nothing_left_to_fault(guest: LabDomain, mib: int) -> None:
    """Check that the guest takes few faults when it writes ``mib`` MiB of new memory."""
    before = guest.faults()
    guest.command(f"alloc {mib}")
    assert guest.faults() - before < MAX_RESIDUAL_FAULTS


@pytest.mark.parametrize("method", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_cold_start(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
    method: str,
) -> None:
    guest = make_prepared_domain(make_domain, method, f"cold-{method}")
    if method == HOOK:
        write_hook_config('[default]\nstart = "later"\n')
    seconds = start_timed(guest, method)
    guest.wait_ready()
    report_row("cold start", method, guest.faults(), f"start {seconds:.2f} s")
    if method == HOOK:
        # libvirt calls the hook after the vCPUs have started, so the guest takes some faults
        # before the hook's run begins.
        assert guest.faults() > MAX_RESIDUAL_FAULTS
        wait_until(lambda: syslog.lines(VERIFIED), "the run that the hook started has ended")
        check_nothing_left_to_fault(guest, 96)
        return
    assert (guest.faults() > PAGES) is (method != PLUGIN)
    assert method != PLUGIN or guest.faults() < MAX_RESIDUAL_FAULTS


@pytest.mark.parametrize("method", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_managed_save(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
    method: str,
) -> None:
    guest = make_prepared_domain(make_domain, method, f"saved-{method}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    guest.virsh("managedsave")
    if method == HOOK:
        write_hook_config('[default]\nrestore = "now"\n')
    seconds = start_timed(guest, method)
    guest.check_memory()
    report_row("restore", method, guest.faults(), f"start {seconds:.2f} s")
    assert (guest.faults() > PAGES) is (method == NOTHING)
    assert method == NOTHING or guest.faults() < MAX_RESIDUAL_FAULTS, syslog.lines()


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
    """Print the duration of each hook call, because libvirt waits for the hook."""
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


@pytest.mark.parametrize("method", [NOTHING, PLUGIN, FOLLOW])
def test_reset(make_domain: MakeDomain, report_row: ReportRow, method: str) -> None:
    guest = make_prepared_domain(make_domain, method, f"reset-{method}")
    guest.start()
    guest.wait_ready()
    with (
        Follower("--domain", guest.name)
        if method == FOLLOW
        else contextlib.nullcontext() as follower
    ):
        faults = faults_of_reset(guest)
        report_row("reset", method, faults)
        if follower is not None:
            assert follower.prefaulted()["why"] == "the tables were dropped"
            check_nothing_left_to_fault(guest, 96)
    assert (faults > MAX_RESIDUAL_FAULTS) is (method != PLUGIN)
    assert method != NOTHING or faults > PAGES


def test_reset_does_not_call_hook(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    hook_calls: HookCalls,
    report_row: ReportRow,
) -> None:
    """Check that libvirt calls no hook for a reset, so that the guest takes faults."""
    guest = make_domain(f"reset-{HOOK}")
    write_hook_config('[default]\nstart = "later"\n')
    guest.start()
    guest.wait_ready()
    wait_until(lambda: syslog.lines(VERIFIED), "the run that the hook started has ended")
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


@pytest.mark.parametrize("method", [NOTHING, PLUGIN, COMMAND, FOLLOW])
def test_hotplug(
    make_domain: MakeDomain,
    hook_calls: HookCalls,
    report_row: ReportRow,
    method: str,
    tmp_path: Path,
) -> None:
    guest = make_prepared_domain(
        make_domain,
        method,
        f"plug-{method}",
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
        if method == FOLLOW
        else contextlib.nullcontext() as follower
    ):
        with expect_acpi_ost(guest):
            guest.virsh("attach-device", str(file), "--live")
        if method == COMMAND:
            tool_output("--domain", guest.name, "--range", "4G+256M")
        if method == PLUGIN:
            wait_until(lambda: not plugin_status(guest)["pending"], "the plugin has finished")
        if follower is not None:
            assert follower.prefaulted()["why"] == "memory was added"
        before = guest.faults()
        guest.command("alloc 320")  # more than the guest's memory without the DIMM
        faults = guest.faults() - before
    report_row("hotplug", method, faults)
    assert hook_calls() == calls
    least = {NOTHING: 256 * 256, COMMAND: MAX_RESIDUAL_FAULTS}.get(method, 0)
    most = {NOTHING: 321 * 256, COMMAND: 128 * 256}.get(method, MAX_RESIDUAL_FAULTS)
    assert least <= faults <= most


def plugin_status(guest: LabDomain) -> dict[str, Any]:
    status = json.loads(tool_output("libvirt", "status", guest.name, "--json"))
    plugin: dict[str, Any] = status["plugin"]
    return plugin


@contextlib.contextmanager
def expect_acpi_ost(guest: LabDomain) -> Iterator[None]:
    """Check that QEMU reports the guest's reply to a hotplug (ACPI_DEVICE_OST)."""
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


@pytest.mark.parametrize("method", [NOTHING, PLUGIN, COMMAND])
def test_migration(
    make_domain: MakeDomain, other_host: Libvirtd, report_row: ReportRow, method: str
) -> None:
    guest = make_prepared_domain(make_domain, method, f"move-{method}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    there = guest.daemon
    if method == COMMAND:
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
    report_row("migration", method, arrived.faults())
    assert (arrived.faults() > PAGES) is (method == NOTHING)
    assert method == NOTHING or arrived.faults() < MAX_RESIDUAL_FAULTS
    assert apparmor_label(arrived) == f":{host_namespace('other')}:libvirt-{guest.uuid} (enforce)"


def test_hook_prefaults_after_migration(
    make_domain: MakeDomain,
    other_host: Libvirtd,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    report_row: ReportRow,
) -> None:
    """Check that the hook's run waits until the incoming migration has completed.

    libvirt calls the hook before QEMU has loaded the guest's RAM. A client of libvirt waits at most
    30 s for a busy domain (QEMU_JOB_WAIT_TIME in src/qemu/qemu_domain.c). The hook's run must wait
    longer.
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
    wait_until(lambda: syslog.lines(VERIFIED), "the run that the hook started has ended")
    assert syslog.lines("move-hook is migrating in"), syslog.lines()
    assert arrived.command("stop")["bad"] == 0
    check_nothing_left_to_fault(arrived, 64)
