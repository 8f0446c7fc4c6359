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
from libvirt_tool import FEW, PAGES, label, tool

from qemu_prefault.lab.libvirtd import Domain, Libvirtd, host_namespace, wait_until
from qemu_prefault.libvirt.installation import HOOK as HOOK_FILE

pytestmark = pytest.mark.full

NOTHING, PLUGIN, HOOK, COMMAND = "nothing", "plugin", "hook", "command"


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


@pytest.mark.parametrize("route", [NOTHING, PLUGIN])
def test_cold_start(domain, tell, route):
    guest = prepared(domain, route, f"cold-{route}")
    began = time.monotonic()
    guest.virsh("start")
    seconds = time.monotonic() - began
    guest.attach_serial()
    guest.wait_ready()
    tell("cold start", route, guest.faults(), f"virsh start {seconds:.2f} s")
    assert (guest.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or guest.faults() < FEW


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, HOOK, COMMAND])
def test_managed_save_and_restore(domain, policy, syslog, tell, route):
    guest = prepared(domain, route, f"saved-{route}")
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    guest.virsh("managedsave")
    if route == HOOK:
        policy('[default]\nrestore = "now"\n')
    began = time.monotonic()
    if route == COMMAND:
        tool("libvirt", "start", guest.name)
    else:
        guest.virsh("start")
    seconds = time.monotonic() - began
    guest.attach_serial()
    guest.check_memory()
    tell("restore", route, guest.faults(), f"start {seconds:.2f} s")
    assert (guest.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or guest.faults() < FEW, syslog.lines()


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


@pytest.mark.parametrize("route", [NOTHING, PLUGIN])
def test_reset(domain, tell, route):
    guest = prepared(domain, route, f"reset-{route}")
    guest.start()
    guest.wait_ready()
    before = guest.faults()
    guest.reset()
    guest.wait_ready()
    faults = guest.faults() - before
    tell("reset", route, faults)
    assert (faults > PAGES) is (route == NOTHING)
    assert route == NOTHING or faults < FEW


DIMM = """<memory model='dimm'>
  <target><size unit='MiB'>256</size><node>0</node></target>
</memory>
"""


@pytest.mark.parametrize("route", [NOTHING, PLUGIN, COMMAND])
def test_hotplug(domain, tell, route, tmp_path):
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
    with guest_has_taken_it(guest):
        guest.virsh("attach-device", str(file), "--live")
    if route == COMMAND:
        tool("--domain", guest.name, "--range", "4G+256M")
    if route == PLUGIN:
        wait_until(lambda: not plugin_status(guest)["pending"], "the plugin has done it")
    before = guest.faults()
    guest.command("alloc 320")  # more than there is without the DIMM
    faults = guest.faults() - before
    tell("hotplug", route, faults)
    least = {NOTHING: 256 * 256, COMMAND: FEW, PLUGIN: 0}[route]
    most = {NOTHING: 321 * 256, COMMAND: 128 * 256, PLUGIN: FEW}[route]
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
                *("--migrate-uri", "tcp://127.0.0.1:49152", "--persistent"),
            )
        finally:
            del os.environ["LIBVIRT_DEFAULT_URI"]
    else:
        guest.virsh(
            *("migrate", "--live", "--persistent", "--desturi", other.uri),
            *("--migrateuri", "tcp://127.0.0.1:49152"),
        )
    arrived = guest.moved_to(other)
    arrived.attach_serial()
    wait_until(lambda: arrived.state == "running", "it runs there")
    arrived.check_memory()
    tell("migration", route, arrived.faults())
    assert (arrived.faults() > PAGES) is (route == NOTHING)
    assert route == NOTHING or arrived.faults() < FEW
    assert label(arrived) == f":{host_namespace('other')}:libvirt-{guest.uuid} (enforce)"
