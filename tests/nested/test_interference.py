# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a run reports interfering events, and that QEMU does not hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from qemu_prefault.agents.qemu_process import helper_threads
from qemu_prefault.host.procfs import thread_names
from qemu_prefault_lab.guest import Guest
from support.guest import MakeGuest, check_memory, plug_dimm, prefault, start_tool, wait_migrated
from support.process import leftovers, wait_clean
from support.tool import Result

pytestmark = pytest.mark.any_agent


class ThrottledRun:
    """A run of the tool whose threads are slowed down after prefaulting has begun.

    Until :meth:`finish` is called, QEMU's prefaulting threads get almost no CPU time.
    """

    def __init__(
        self, guest: Guest, options: tuple[str, ...], agent: str, pages: int = 1000
    ) -> None:
        self._tool = start_tool(guest, "--chunk", "4096", *options)
        deadline = time.monotonic() + 60
        while guest.stats()["pages_4k"] < pages:
            assert self._tool.running(), self._tool.finish()
            assert time.monotonic() < deadline, "the run made no progress"
        # A patched QEMU has no helpers, because its vCPU threads prefault.
        others = [tid for tid in thread_names(guest.pid) if tid != guest.pid]
        for tid in helper_threads(guest.pid) if agent == "attach" else others:
            os.setpriority(os.PRIO_PROCESS, tid, 19)
        # Load each CPU, so that these threads get about 1/70 of the CPU time.
        self._competitors = [
            subprocess.Popen(["taskset", "--cpu-list", str(cpu), "sh", "-c", "while :; do :; done"])
            for cpu in os.sched_getaffinity(0)
        ]

    def send_signal(self, number: int) -> None:
        self._tool.send_signal(number)

    def finish(self) -> Result:
        """Let the run continue at full speed, and wait until the tool exits."""
        self.close()
        return self._tool.finish()

    def wait(self) -> Result:
        """Wait until the tool exits while its threads are still slowed down."""
        return self._tool.finish()

    def close(self) -> None:
        for process in self._competitors:
            process.kill()
            process.wait()


class StartRun(Protocol):
    def __call__(self, guest: Guest, *options: str) -> ThrottledRun: ...


@pytest.fixture
def throttled_run(agent: str) -> Iterator[StartRun]:
    """Return a function that starts a run and waits until some pages are prefaulted."""
    runs: list[ThrottledRun] = []

    def start(guest: Guest, *options: str) -> ThrottledRun:
        runs.append(ThrottledRun(guest, options, agent))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def check_usable(guest: Guest) -> None:
    """Check that the helpers have exited and that another run completes."""
    wait_clean(guest.pid)
    again = prefault(guest)
    assert again.status == 0, again.stderr


def check_clear_end(result: Result, *statuses: int) -> None:
    assert result.status in statuses, (result.stdout, result.stderr)
    if "error" in result.report:
        assert result.error["cause"]


def test_cont_from_another_monitor(make_restored_guest: MakeGuest, throttled_run: StartRun) -> None:
    guest = make_restored_guest()
    run = throttled_run(guest)
    guest.qmp("cont")
    result = run.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "resumed"
    assert guest.status() == "running"
    check_memory(guest)
    check_usable(guest)


def test_system_reset(make_restored_guest: MakeGuest, throttled_run: StartRun) -> None:
    guest = make_restored_guest(args=["-action", "reboot=reset"])
    run = throttled_run(guest)
    guest.qmp("system_reset")
    check_clear_end(run.finish(), 0, 3)
    check_usable(guest)


@pytest.mark.full
def test_quit(make_restored_guest: MakeGuest, throttled_run: StartRun) -> None:
    guest = make_restored_guest()
    run = throttled_run(guest)
    guest.monitor.execute("quit")
    guest.wait_exit(20)
    check_clear_end(run.finish(), 1)


def test_qemu_killed(make_restored_guest: MakeGuest, throttled_run: StartRun) -> None:
    guest = make_restored_guest()
    run = throttled_run(guest)
    guest.process.send_signal(signal.SIGKILL)
    result = run.finish()
    check_clear_end(result, 1)
    assert result.error["code"] in ("qemu-gone", "monitor-closed")


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.full), ("--cont",)], ids=["plain", "cont"]
)
def test_migration_started(
    make_restored_guest: MakeGuest,
    tmp_path: Path,
    options: tuple[str, ...],
    throttled_run: StartRun,
) -> None:
    """Check that the tool does not start a guest while the guest is migrating away."""
    guest = make_restored_guest()
    run = throttled_run(guest, *options)
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    guest.qmp("migrate", uri=f"exec:cat >'{tmp_path / 'out'}'")
    result = run.wait()
    check_clear_end(result, 5)
    assert result.error["code"] == "migration"
    assert not guest.qmp("query-status")["running"]
    guest.qmp("migrate_cancel")
    guest.wait_event("MIGRATION")


def test_migrated_guest_is_not_resumed(
    make_restored_guest: MakeGuest, throttled_run: StartRun
) -> None:
    """Check that a migrated guest stays stopped, because it runs on its destination."""
    guest = make_restored_guest()
    guest.qmp("cont")
    run = throttled_run(guest)
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
    guest.qmp("migrate", uri="exec:cat >/dev/null")
    wait_migrated(guest)
    result = run.finish()
    check_clear_end(result, 5)
    assert result.error["code"] == "migration"
    assert guest.status() == "postmigrate"


@pytest.mark.full
def test_late_migration_keeps_guest_paused(
    make_restored_guest: MakeGuest, throttled_run: StartRun
) -> None:
    """Check that ``--cont`` does not start a guest whose migration has begun."""
    guest = make_restored_guest()
    run = throttled_run(guest, "--cont")
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    guest.qmp("migrate", uri="exec:cat >/dev/null")
    result = run.finish()
    check_clear_end(result, 5)
    assert result.error["code"] == "migration"
    assert guest.status() == "paused"


@pytest.mark.full
def test_dimm_plugged(throttled_run: StartRun) -> None:
    with Guest(memory="slots=2,maxmem=2G", paused=True, memory_mib=256) as guest:
        run = throttled_run(guest)
        plug_dimm(guest, 64 << 20)
        result = run.finish()
        check_clear_end(result, 0)
        assert "layout-changed" in result.warnings
        dimm = next(s for s in result.report["sections"] if s["name"] == "d0")
        assert dimm["prefaulted"] == 64 << 20


@pytest.mark.agents("attach")
def test_stopped_tool_loses_helpers(
    make_restored_guest: MakeGuest, throttled_run: StartRun
) -> None:
    """Stop the tool with SIGSTOP: its helpers must exit (``Limits.dead_man``)."""
    guest = make_restored_guest()
    run = throttled_run(guest)
    run.send_signal(signal.SIGSTOP)
    wait_clean(guest.pid)
    run.send_signal(signal.SIGCONT)
    result = run.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "agent-left"
    check_usable(guest)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_interrupted_tool_resumes_guest(
    make_restored_guest: MakeGuest, number: signal.Signals, throttled_run: StartRun
) -> None:
    guest = make_restored_guest()
    guest.qmp("cont")
    run = throttled_run(guest)
    run.send_signal(number)
    result = run.finish()
    check_clear_end(result, 1)
    assert result.error["code"] == "interrupted"
    assert guest.status() == "running"
    check_memory(guest)
    assert leftovers(guest.pid) == []


def stale_root(guest: Guest) -> Result:
    """Prefault, re-create a memslot while no vCPU runs, and prefault again.

    The memslot is the VGA's memory. The monitor writes to the VGA's PCI command register
    (0x04 of 00:02.0), which unmaps this memory and maps it again.
    """
    assert prefault(guest).status == 0
    for value in ("0x0", "0x3"):
        guest.hmp("o /w 0xcf8 0x80001004")
        guest.hmp(f"o /h 0xcfc {value}")
    assert guest.stats()["pages_4k"] < 1000, "deleting the slot did not drop the tables"
    return prefault(guest, "--range", "1M+64M")


@pytest.mark.full
@pytest.mark.agents("attach")
def test_stale_root_is_reported() -> None:
    """Check that the tool detects a kernel that retries forever on an obsolete root.

    Since Linux 6.15 (commit 20a6cff3b283), kvm_mmu_reload() frees such a root.
    """
    with Guest(machine="pc", paused=True, args=["-device", "VGA,addr=2"]) as guest:
        guest.hmp("o /w 0xcf8 0x80001010")
        guest.hmp("o /w 0xcfc 0xfd000000")
        guest.hmp("o /w 0xcf8 0x80001004")
        guest.hmp("o /h 0xcfc 0x3")
        result = stale_root(guest)
        if result.status == 0:
            assert result.report["bytes"]["remaining"] == 0
            return  # this kernel has the fix
        assert result.status == 3
        assert "vcpu-unusable" in result.warnings
        assert "no progress" in result.stdout
        assert guest.status() == "prelaunch"
        wait_clean(guest.pid)
        assert not helper_threads(guest.pid)
        guest.qmp("cont")  # KVM replaces the obsolete root when the vCPU runs
        guest.wait_ready()
        assert prefault(guest).status == 0


@pytest.mark.full
def test_quit_of_running_guest(
    make_restored_guest: MakeGuest, tmp_path: Path, throttled_run: StartRun
) -> None:
    guest = make_restored_guest()
    guest.qmp("cont")
    run = throttled_run(guest)
    guest.monitor.execute("quit")
    guest.wait_exit(20)
    check_clear_end(run.finish(), 1)
