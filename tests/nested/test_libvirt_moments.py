# SPDX-License-Identifier: GPL-2.0-or-later
"""Which route helps when: the table of docs/libvirt.md, measured.

Faults are KVM's ``pf_taken``. Each guest writes 64 MiB; on 4K pages that is 16,384 faults if
nothing is done for it. Rows come out as lines ``libvirt-table: MOMENT | ROUTE | FAULTS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.libvirt.installation import HOOK as HOOK_FILE
from qemu_prefault_lab.libvirtd import Domain, Libvirtd, host_namespace, wait_until
from support.libvirt import FEW, PAGES, label, tool

pytestmark = [pytest.mark.libvirt, pytest.mark.full]

NOTHING, PLUGIN, HOOK, COMMAND, FOLLOW = "nothing", "plugin", "hook", "command", "follow"
VERIFIED = "verified: all"
"""What the run that the hook hands over to ends with."""


@pytest.fixture
def tell(capsys):
    def tell(moment: str, route: str, faults: int, note: str = "") -> None:
        with capsys.disabled():
            print(f"\nlibvirt-table: {moment} | {route} | {faults:,} | {note}")

    return tell


def prepared(domain, route: str, name: str, **options) -> Domain:
    guest = domain(name, **options)
    if route == PLUGIN:
        tool("libvirt", "enable", name)
    return guest


@pytest.fixture
def hook_calls() -> Iterator[Any]:
    """What libvirt calls its hooks for: another script beside ours tells."""
    script = Path("/") / HOOK_FILE.with_name("99-calls")
    told = Path("/run/hook-calls")
    told.write_text("")
    script.write_text(f'#!/bin/sh\necho "$2 $3" >>{told}\n')
    script.chmod(0o755)
    yield lambda: told.read_text().splitlines()
    script.unlink()
    told.unlink()


def start_timed(guest: Domain, route: str) -> float:
    """Start it, by our command or libvirt's; give the seconds that took."""
    began = time.monotonic()
    if route == COMMAND:
        tool("libvirt", "start", guest.name)
    else:
        guest.virsh("start")
    seconds = time.monotonic() - began
    guest.attach_serial()
    return seconds


def nothing_is_left_to_fault(guest: Domain, mib: int) -> None:
    """Memory that the guest has not written yet is there when it does."""
    before = guest.faults()
    guest.command(f"alloc {mib}")
    assert guest.faults() - before < FEW


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_cold_start(domain, policy, syslog, tell, route):
    guest = prepared(domain, route, f"cold-{route}")
    if route == HOOK:
        policy('[default]\nstart = "later"\n')
    seconds = start_timed(guest, route)
    guest.wait_ready()
    tell("cold start", route, guest.faults(), f"start {seconds:.2f} s")
    if route == HOOK:
        # The vCPUs run when it is called, so how far the guest gets is a race.
        assert guest.faults() > FEW
        wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
        nothing_is_left_to_fault(guest, 96)
        return
    assert (guest.faults() > PAGES) is (route != PLUGIN)
    assert route != PLUGIN or guest.faults() < FEW


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_managed_save_and_restore(domain, policy, syslog, tell, route):
    guest = prepared(domain, route, f"saved-{route}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    guest.virsh("managedsave")
    if route == HOOK:
        policy('[default]\nrestore = "now"\n')
    seconds = start_timed(guest, route)
    guest.check_memory()
    tell("restore", route, guest.faults(), f"start {seconds:.2f} s")
    assert (guest.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or guest.faults() < FEW, syslog.lines()


def test_a_saved_file(domain, tell, tmp_path):
    guest = domain("file")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    file = tmp_path / "saved"
    guest.virsh("save", str(file))
    tool("libvirt", "restore", str(file))
    guest.attach_serial()
    guest.check_memory()
    tell("restore of a file", COMMAND, guest.faults())
    assert guest.faults() < FEW


def test_what_the_hook_adds_to_a_start(libvirtd, policy, capsys):
    """libvirt waits for each of its calls; times are told, not judged."""
    plain = "<domain type='kvm'><name>a</name><uuid>u</uuid><memory>1024</memory></domain>"
    asked = plain.replace("<name>", "<!-- qemu-prefault --><name>")

    def seconds(operation: str, xml: str) -> float:
        times = []
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
            ("a call that is none of ours", "prepare", plain),
            ("a domain that nobody speaks of", "started", plain),
            ("a domain whose policy is off", "started", asked),
        ):
            print(f"\nlibvirt-latency: {what} | {seconds(operation, xml) * 1000:.0f} ms")


class Follower:
    """``--domain NAME --follow``, once it has made its first run; a context manager."""

    def __init__(self, guest: Domain) -> None:
        self._child = subprocess.Popen(
            ["qemu-prefault", "--domain", guest.name, "--follow", "--json"],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> Follower:
        assert self.prefaulted()["why"] == "started"
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def prefaulted(self) -> dict[str, Any]:
        """The next time it has done something."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "prefaulted":
                return event
        raise AssertionError("it has ended")


def faults_of_a_reset(guest: Domain) -> int:
    before = guest.faults()
    guest.reset()
    guest.wait_ready()
    return guest.faults() - before


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, FOLLOW])
def test_reset(domain, tell, route):
    guest = prepared(domain, route, f"reset-{route}")
    guest.start()
    guest.wait_ready()
    with Follower(guest) if route == FOLLOW else contextlib.nullcontext() as follower:
        faults = faults_of_a_reset(guest)
        tell("reset", route, faults)
        if follower is not None:
            assert follower.prefaulted()["why"] == "the tables were dropped"
            nothing_is_left_to_fault(guest, 96)
    assert (faults > FEW) is (route != PLUGIN)
    assert route != NOTHING or faults > PAGES


def test_reset_with_the_hook(domain, policy, syslog, hook_calls, tell):
    """It is not called, and what it has done before is lost."""
    guest = domain(f"reset-{HOOK}")
    policy('[default]\nstart = "later"\n')
    guest.start()
    guest.wait_ready()
    wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
    calls = hook_calls()
    assert "started begin" in calls
    faults = faults_of_a_reset(guest)
    tell("reset", HOOK, faults)
    assert hook_calls() == calls
    assert faults > PAGES


DIMM = """<memory model='dimm'>
  <target><size unit='MiB'>256</size><node>0</node></target>
</memory>
"""


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, COMMAND, FOLLOW])
def test_hotplug(domain, hook_calls, tell, route, tmp_path):
    guest = prepared(
        domain,
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
    with Follower(guest) if route == FOLLOW else contextlib.nullcontext() as follower:
        with guest_has_taken_it(guest):
            guest.virsh("attach-device", str(file), "--live")
        if route == COMMAND:
            tool("--domain", guest.name, "--range", "4G+256M")
        if route == PLUGIN:
            wait_until(lambda: not plugin_status(guest)["pending"], "the plugin has done it")
        if follower is not None:
            assert follower.prefaulted()["why"] == "memory was added"
        before = guest.faults()
        guest.command("alloc 320")  # more than there is without the DIMM
        faults = guest.faults() - before
    tell("hotplug", route, faults)
    assert hook_calls() == calls
    least = {NOTHING: 256 * 256, COMMAND: FEW}.get(route, 0)
    most = {NOTHING: 321 * 256, COMMAND: 128 * 256}.get(route, FEW)
    assert least <= faults <= most


def plugin_status(guest: Domain) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(tool("libvirt", "status", guest.name, "--json"))["plugin"]
    return status


@contextlib.contextmanager
def guest_has_taken_it(guest: Domain) -> Iterator[None]:
    """QEMU tells what the guest's ACPI says of a device that was plugged."""
    waiting = subprocess.Popen(
        ["virsh", "-c", guest.daemon.uri, "qemu-monitor-event", guest.name, "--event",
         "ACPI_DEVICE_OST", "--timeout", "60"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield
    said, _ = waiting.communicate(timeout=90)
    assert "ACPI_DEVICE_OST" in said


@pytest.fixture(scope="module")
def other(libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    with Libvirtd(host="other") as started:
        yield started


MIGRATE = ("--persistent", "--migrateuri", "tcp://127.0.0.1:49152")


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, COMMAND])
def test_migration(domain, other, tell, route):
    guest = prepared(domain, route, f"move-{route}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    there = guest.daemon
    if route == COMMAND:
        os.environ["LIBVIRT_DEFAULT_URI"] = other.uri
        try:
            tool(
                *("libvirt", "migrate", guest.name, "--from", there.uri),
                *("--migrate-uri", MIGRATE[-1], "--persistent"),
            )
        finally:
            del os.environ["LIBVIRT_DEFAULT_URI"]
    else:
        guest.virsh("migrate", "--live", *MIGRATE, "--desturi", other.uri)
    arrived = guest.moved_to(other)
    arrived.attach_serial()
    wait_until(lambda: arrived.state == "running", "it runs there")
    arrived.check_memory()
    tell("migration", route, arrived.faults())
    assert (arrived.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or arrived.faults() < FEW
    assert label(arrived) == f":{host_namespace('other')}:libvirt-{guest.uuid} (enforce)"


def test_migration_with_the_hook(domain, other, policy, syslog, tell):
    """It is called before RAM is there, and what it hands over to has to wait: for longer than
    libvirt lets anybody wait for a domain that it is busy with, which is 30 s."""
    guest = domain("move-hook")
    guest.start()
    guest.wait_ready()
    policy('[default]\nmigrate = "later"\n')
    guest.command("run")  # it writes all of its memory over and over, here and there
    guest.virsh(
        *("migrate", "--live", *MIGRATE, "--desturi", other.uri),
        *("--bandwidth", "4", "--timeout", "80", "--timeout-suspend"),
    )
    arrived = guest.moved_to(other)
    arrived.attach_serial()
    wait_until(lambda: arrived.state == "running", "it runs there")
    passes = arrived.command("status")["passes"]
    wait_until(lambda: arrived.command("status")["passes"] > passes, "it writes there")
    tell("migration", HOOK, arrived.faults())
    assert arrived.faults() > FEW
    wait_until(lambda: syslog.lines(VERIFIED), "the hook's run has ended")
    assert syslog.lines("move-hook is migrating in"), syslog.lines()
    assert arrived.command("stop")["bad"] == 0
    nothing_is_left_to_fault(arrived, 64)
