# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody else acts on the guest in the middle of a run: a clear end, never a hung QEMU."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from conftest import prefault, start_tool

from qemu_prefault.agents.attach import helper_threads
from qemu_prefault.lab.guest import Guest
from qemu_prefault.lab.tool import Result, Tool, leftovers, wait_clean

# One page per system call makes a run long enough to be met in the middle.
SLOWLY = ("--chunk", "4096")


def start_and_meet(guest: Guest, *options: str, pages: int = 2000) -> Tool:
    """Start a slow run; return when it has prefaulted some pages and goes on."""
    process = start_tool(guest, *SLOWLY, *options)
    deadline = time.monotonic() + 60
    while guest.stats()["pages_4k"] < pages:
        assert process.running(), process.finish()
        assert time.monotonic() < deadline, "the run made no progress"
    return process


def check_usable(guest: Guest) -> None:
    """QEMU answers, nothing of us is left, and a new run completes."""
    wait_clean(guest.pid)
    again = prefault(guest)
    assert again.status == 0, again.stderr


def check_clear_end(result: Result, *statuses: int) -> None:
    assert result.status in statuses, (result.stdout, result.stderr)
    if "error" in result.report:
        assert result.error["cause"]


def test_cont_from_another_monitor(restored):
    guest = restored()
    process = start_and_meet(guest)
    guest.qmp("cont")
    result = process.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "resumed"
    assert guest.status() == "running"
    assert guest.command("pass")["bad"] == 0
    check_usable(guest)


def test_system_reset(restored):
    guest = restored(args=["-action", "reboot=reset"])
    process = start_and_meet(guest)
    guest.qmp("system_reset")
    check_clear_end(process.finish(), 0, 3)
    check_usable(guest)


def test_quit(restored):
    guest = restored()
    process = start_and_meet(guest)
    guest.monitor.execute("quit")
    guest.wait_exit(20)
    check_clear_end(process.finish(), 1)


def test_qemu_killed(restored):
    guest = restored()
    process = start_and_meet(guest)
    guest.process.send_signal(signal.SIGKILL)
    result = process.finish()
    check_clear_end(result, 1)
    assert result.error["code"] in ("qemu-gone", "monitor-closed")


@pytest.mark.parametrize("options", [(), ("--cont",)], ids=["plain", "cont"])
def test_migration_started(restored, tmp_path, options):
    """A guest that was found paused stays so: it is not ours to start under a migration."""
    guest = restored()
    process = start_and_meet(guest, *options)
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    guest.qmp("migrate", uri=f"exec:cat >'{tmp_path / 'out'}'")
    result = process.finish()
    check_clear_end(result, 5)
    assert result.error["code"] == "migration"
    assert not guest.qmp("query-status")["running"]
    guest.qmp("migrate_cancel")
    guest.wait_event("MIGRATION")


def test_dimm_plugged():
    with Guest(memory="slots=2,maxmem=2G", paused=True, memory_mib=256) as guest:
        process = start_and_meet(guest)
        guest.qmp("object-add", **{"qom_type": "memory-backend-ram", "id": "d0", "size": 64 << 20})
        guest.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="d0")
        result = process.finish()
        check_clear_end(result, 0)
        assert "layout-changed" in result.warnings
        dimm = next(s for s in result.report["sections"] if s["name"] == "d0")
        assert dimm["prefaulted"] == 64 << 20


def test_a_stopped_tool_loses_its_helpers_not_the_guest(restored):
    """SIGSTOP: the dead man's switch. The guest was paused by the operator and stays so."""
    guest = restored()
    process = start_and_meet(guest)
    process.send_signal(signal.SIGSTOP)
    wait_clean(guest.pid)
    process.send_signal(signal.SIGCONT)
    result = process.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "agent-left"
    check_usable(guest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tool_resumes_the_guest(restored, number):
    guest = restored()
    guest.qmp("cont")
    process = start_and_meet(guest)
    process.send_signal(number)
    result = process.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "interrupted"
    assert guest.status() == "running"
    assert guest.command("pass")["bad"] == 0
    assert leftovers(guest.pid) == []


def stale_root(guest: Guest) -> Result:
    """Have a memslot deleted while no vCPU runs, then prefault again.

    The VGA's memory is unmapped by its PCI command register (0x04 of 00:02.0), through the
    monitor's port access.
    """
    assert prefault(guest).status == 0
    for value in ("0x0", "0x3"):
        guest.hmp("o /w 0xcf8 0x80001004")
        guest.hmp(f"o /h 0xcfc {value}")
    assert guest.stats()["pages_4k"] < 1000, "the slot deletion was to drop the tables"
    return prefault(guest, "--range", "1M+64M")


def test_a_stale_root_is_named_not_waited_for():
    """Kernels without 20a6cff3b283 (v6.15) retry for ever on a root that is obsolete."""
    with Guest(machine="pc", paused=True, args=["-device", "VGA,addr=2"]) as guest:
        guest.hmp("o /w 0xcf8 0x80001010")
        guest.hmp("o /w 0xcfc 0xfd000000")
        guest.hmp("o /w 0xcf8 0x80001004")
        guest.hmp("o /h 0xcfc 0x3")
        result = stale_root(guest)
        if result.status == 0:
            assert result.report["bytes"]["remaining"] == 0
            return  # a kernel with the fix
        assert result.status == 3
        assert "vcpu-unusable" in result.warnings
        assert "no progress" in result.stdout
        assert guest.status() == "prelaunch"
        wait_clean(guest.pid)
        assert not helper_threads(guest.pid)
        guest.qmp("cont")  # going through the guest once cures it
        guest.wait_ready()
        assert prefault(guest).status == 0


def test_a_qemu_that_exits_while_a_helper_waits(restored, tmp_path: Path):
    guest = restored()
    guest.qmp("cont")
    process = start_and_meet(guest)
    guest.monitor.execute("quit")
    guest.wait_exit(20)
    check_clear_end(process.finish(), 1)
