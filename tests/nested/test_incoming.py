# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are yet to arrive, by migration or restore: prefaulted before they start."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import OTHER_MIB, SNAPSHOT, add_disk, faults, prefault, run_job, start_tool
from support.process import leftovers, wait_clean
from support.tool import Tool

pytestmark = pytest.mark.any_agent

WORKLOAD_MIB = 32
MEMORY_MIB = WORKLOAD_MIB + OTHER_MIB
PAGES = WORKLOAD_MIB << 8


class Migration:
    """A guest at work, and the QEMU it is to go to."""

    def __init__(self, source: Guest, directory: Path, **options: Any) -> None:
        self.uri = f"unix:{directory / 'migration'}"
        self.source = source
        self.target = Guest(memory_mib=MEMORY_MIB, incoming=self.uri, **options)
        self.source.qmp("cont")
        assert self.source.command("run")["ok"] == 1
        self.source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)

    def start_tool(self, *options: str) -> Tool:
        """Start the tool at the target; return when it awaits the guest, and populates."""
        tool = start_tool(self.target, "--incoming", *options)
        wait_for(lambda: not tool.running() or tool.has_said("ready"), "a tool that awaits it")
        assert tool.running(), tool.finish()
        return tool

    def start(self) -> None:
        self.source.qmp("migrate", uri=self.uri)

    def finish(self) -> None:
        """Wait until all is sent; the workload is at the target then."""
        while (status := self.source.wait_event("MIGRATION")["data"]["status"]) != "completed":
            assert status not in ("failed", "cancelled"), status

    def faults(self) -> int:
        """What the guest took at the target until it had written each page there."""
        assert self.target.command("stop")["bad"] == 0
        assert self.target.command("pass")["bad"] == 0
        return faults(self.target)


@pytest.fixture
def migration(restored: Callable[..., Guest], tmp_path: Path) -> Iterator[Callable[..., Migration]]:
    made: list[Migration] = []

    def make(**options: Any) -> Migration:
        made.append(Migration(restored(workload_mib=WORKLOAD_MIB), tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.target.kill()


@pytest.mark.every_kernel
def test_a_migrated_guest_takes_no_faults(migration):
    plain = migration()
    plain.start()
    plain.finish()
    without = plain.faults()
    assert without >= PAGES  # there is something to win

    one = migration()
    tool = one.start_tool()
    one.start()
    one.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert one.target.status() == "running"
    assert one.faults() <= without / 100
    assert result.report["bytes"]["remaining"] == 0
    assert result.report["seconds"]["paused"] >= result.report["seconds"]["prefault"]
    assert "firmware-ahead" not in result.warnings
    assert leftovers(one.target.pid) == []


@pytest.mark.full
@pytest.mark.parametrize("options", [(), ("--cont",)], ids=["plain", "cont"])
def test_a_target_started_with_s_is_resumed_only_if_asked_for(migration, options):
    one = migration(paused=True)
    tool = one.start_tool(*options)
    one.start()
    one.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert one.target.status() == ("running" if options else "paused")
    one.target.qmp("cont")
    assert one.faults() <= PAGES / 100


def test_the_downtime_is_bounded(migration):
    one = migration()
    tool = one.start_tool("--max-downtime", "0.05", "--chunk", "4M")
    one.start()
    one.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    seconds = result.report["seconds"]
    assert seconds["longest_pause"] < seconds["paused"]  # it took more than one
    assert result.report["bytes"]["remaining"] == 0
    assert one.target.stats()["pages_4k"] << 12 >= result.report["bytes"]["requested"]
    assert one.target.command("stop")["bad"] == 0


def test_a_cancelled_migration_leaves_the_source_running(migration):
    one = migration()
    tool = one.start_tool()
    one.source.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    one.start()
    while one.source.qmp("query-migrate")["status"] != "active":
        one.source.wait_event("MIGRATION")
    one.source.qmp("migrate_cancel")
    result = tool.finish()
    assert result.status == 1
    assert result.error["code"] == "migration-failed"
    assert one.source.status() == "running"
    assert one.source.command("stop")["bad"] == 0


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_a_guest_starts_even_if_the_tool_is_gone(migration, number):
    one = migration()
    tool = one.start_tool()
    tool.send_signal(number)
    assert not tool.running(30)
    wait_clean(one.target.pid)
    one.start()
    one.finish()
    one.target.wait_event("RESUME")
    assert one.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_a_guest_starts_if_the_tool_is_killed_when_it_has_come(migration):
    one = migration()
    tool = one.start_tool("--chunk", "4096")
    one.start()
    one.finish()
    wait_for(lambda: one.target.stats()["pages_4k"] > 1000, "a tool that prefaults")
    tool.send_signal(signal.SIGKILL)
    one.target.wait_event("RESUME")
    assert one.target.command("stop")["bad"] == 0
    wait_clean(one.target.pid)
    assert prefault(one.target).status == 0


@pytest.mark.full
def test_somebody_resumes_what_is_being_prefaulted(migration):
    one = migration()
    tool = one.start_tool("--chunk", "4096")
    one.start()
    one.finish()
    wait_for(lambda: one.target.stats()["pages_4k"] > 1000, "a tool that prefaults")
    one.target.qmp("cont")
    result = tool.finish()
    assert result.status == 1
    assert result.error["code"] == "resumed"
    assert one.target.status() == "running"
    assert one.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_somebody_lets_it_start_by_itself(migration):
    """`cont` before it has come undoes our `stop`: it is prefaulted as a guest that runs."""
    one = migration()
    tool = one.start_tool()
    one.target.qmp("cont")
    one.start()
    one.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert one.target.status() == "running"
    assert result.report["bytes"]["remaining"] == 0
    assert one.target.stats()["pages_4k"] << 12 >= result.report["bytes"]["requested"]
    assert one.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_a_qemu_that_answers_nothing_while_it_loads_is_waited_for(migration):
    """From a slow file it may load for minutes; the limit for an answer is 30 s otherwise."""
    one = migration()
    tool = one.start_tool()
    one.target.process.send_signal(signal.SIGSTOP)
    assert tool.running(40)
    one.target.process.send_signal(signal.SIGCONT)
    one.start()
    one.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert one.faults() <= PAGES / 100


@pytest.mark.parametrize(
    ("how", "backing"),
    [
        ("file", "ram"),
        ("mapped-ram", "file-private"),
        pytest.param("file", "file-private", marks=pytest.mark.full),
        pytest.param("mapped-ram", "ram", marks=pytest.mark.full),
    ],
)
def test_restore_from_a_file(restored, tmp_path, how, backing):
    state = tmp_path / "state"
    capabilities = [{"capability": "mapped-ram", "state": how == "mapped-ram"}]
    source = restored(workload_mib=WORKLOAD_MIB)
    source.qmp("migrate-set-capabilities", capabilities=capabilities)
    source.save(state)
    with Guest(memory_mib=MEMORY_MIB, incoming="defer", backing=backing) as guest:
        guest.qmp("migrate-set-capabilities", capabilities=capabilities)
        tool = start_tool(guest, "--incoming")
        wait_for(lambda: tool.has_said("ready"), "a tool that awaits it")
        guest.qmp("migrate-incoming", uri=f"file:{state}")
        result = tool.finish()
        assert result.status == 0, (result.stdout, result.stderr)
        assert guest.command("pass")["bad"] == 0
        assert faults(guest) <= PAGES / 100


def test_loadvm(tmp_path):
    """Loading a snapshot resets the machine, which drops the tables of a guest that ran."""
    with Guest(workload_mib=WORKLOAD_MIB, memory_mib=MEMORY_MIB) as guest:
        add_disk(guest, tmp_path / "disk")
        guest.wait_ready()
        assert guest.command("pass")["bad"] == 0
        run_job(guest, "snapshot-save", **SNAPSHOT)
        assert guest.command("pass")["bad"] == 0

        def load() -> int:
            guest.qmp("stop")
            run_job(guest, "snapshot-load", **SNAPSHOT)
            return faults(guest)

        before = load()
        guest.qmp("cont")
        assert guest.command("pass")["bad"] == 0
        without = faults(guest) - before

        before = load()
        result = prefault(guest, "--cont")
        assert result.status == 0, (result.stdout, result.stderr)
        assert guest.command("pass")["bad"] == 0
        print(f"faults after loadvm: {without} without, {faults(guest) - before} with")
        assert faults(guest) - before <= max(without, PAGES) / 100
