# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool, the libvirt hook and the metrics with a process that plays QEMU and lies.

A guest that has taken over its QEMU controls everything that they read from QEMU. In all cases,
they must end soon, use little memory, print no escape sequence and touch no other process.
"""

from __future__ import annotations

import os

import pytest

from support import hostile_qemu
from support.hostile_run import UUID, Run, false_qemu, process_not_to_touch, run_python, run_tool
from support.qemu import MIB, kvm_usable

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm is not usable"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user"),
]

#: The maximum memory of a run in bytes, beyond that of a run on an honest QEMU.
MEMORY = 64 * MIB
DOMAIN = f"""<domain type='kvm'>
  <name>lies</name>
  <uuid>{UUID}</uuid>
  <metadata><p:hook xmlns:p='urn:qemu-prefault:1' restore='now'/></metadata>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
</domain>
"""
#: A program that reads the metrics of the domain once, as the daemon does for each scrape.
SCRAPE = f"""
from types import SimpleNamespace
from prometheus_client import generate_latest
from qemu_prefault.libvirt.metrics import Metrics
daemon = SimpleNamespace(connected=True, on_run=[], running={{"{UUID}": "lies"}})
print(generate_latest(Metrics(daemon).registry).decode(), end="")
"""
#: The tool as on a kernel that cannot refuse descriptors.
WITHOUT_PASSRIGHTS = """
import sys
from qemu_prefault.cli.main import main
from qemu_prefault.host import foreign_fds
foreign_fds.SO_PASSRIGHTS = 9999
sys.exit(main())
"""
#: The lies that send descriptors whose close blocks, in a run that does not pause the guest.
DESCRIPTORS = [
    "monitor: descriptors in the greeting",
    "monitor: descriptors after many events",
    "monitor: urgent descriptors",
]
#: One lie of each kind. make test-full tells all of them.
SELECTED = {
    "monitor: endless answer",
    "monitor: wide answers",
    "query-cpus-fast: init's thread",
    "process: endless arguments",
    "process: escapes in names",
    "text: sparse libc of 1.5 GiB",
    "text: false instructions",
    "process: executes another program",
    "file system: 30,000 directories",
    "monitor: descriptors after many events",
    "helper: tid of another process",
    "helper: batch never done",
    "plugin: silent about a batch",
    "job: no progress",
}
LIES = [
    name if name in SELECTED else pytest.param(name, marks=pytest.mark.full)
    for name in hostile_qemu.LIES
    if name != "honest"
]


def run_all(lie: str) -> tuple[Run, Run, Run]:
    """Run a scrape of the metrics, the hook and the tool on a false QEMU, and return the runs."""
    with process_not_to_touch() as bystander, false_qemu(lie, bystander) as path:
        runtime = {"XDG_RUNTIME_DIR": str(path.parent)}
        scrape = run_python("-c", SCRAPE, environment=runtime)
        assert scrape.status == 0, scrape
        assert 'qemu_prefault_domain_up{domain="lies"}' in scrape.output
        for operation in ("restore", "started"):
            hook = run_tool(
                *("libvirt", "hook", "lies", operation, "begin", "-"),
                stdin=DOMAIN,
                environment=runtime,
            )
            assert hook.status == 0, hook
        return scrape, hook, run_tool("--qmp", str(path), "--populate-only")


@pytest.fixture(scope="module")
def honest() -> tuple[Run, Run, Run]:
    return run_all("honest")


def test_honest_qemu_is_served(honest: tuple[Run, Run, Run]) -> None:
    scrape, hook, run = honest
    assert 'qemu_prefault_plugin{domain="lies"} 0.0' in scrape.output
    assert run.status == 0, run.output
    assert "will be prefaulted" in hook.output or "MiB prefaulted" in hook.output, hook.output


@pytest.mark.parametrize("lie", DESCRIPTORS)
def test_descriptors_are_harmless_on_linux_6_15(lie: str) -> None:
    with process_not_to_touch() as bystander, false_qemu(lie, bystander) as path:
        run = run_python("-c", WITHOUT_PASSRIGHTS, "--qmp", str(path), "--populate-only")
    run.assert_orderly()
    assert "file descriptors" in run.output


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_harmless(honest: tuple[Run, Run, Run], lie: str) -> None:
    for run, honest_run in zip(run_all(lie), honest, strict=True):
        run.assert_orderly()
        assert run.memory < honest_run.memory + MEMORY
