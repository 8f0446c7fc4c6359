# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that migrated and restored guests are prefaulted before they start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Unpack

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import (
    OTHER_MIB,
    SNAPSHOT,
    GuestOptions,
    MakeGuest,
    add_disk,
    check_memory,
    faults,
    prefault,
    run_job,
    start_incoming_tool,
    wait_migrated,
)
from support.process import leftovers, suspended_thread, wait_clean
from support.tool import Tool

pytestmark = pytest.mark.any_agent

WORKLOAD_MIB = 32
MEMORY_MIB = WORKLOAD_MIB + OTHER_MIB
PAGES = WORKLOAD_MIB << 8


class Migration:
    """A guest that writes to its memory, and the QEMU to which it migrates."""

    def __init__(self, source: Guest, directory: Path, **options: Unpack[GuestOptions]) -> None:
        self.uri = f"unix:{directory / 'migration'}"
        self.source = source
        options["memory_mib"] = MEMORY_MIB
        options["incoming"] = self.uri
        self.target = Guest(**options)
        self.source.qmp("cont")
        assert self.source.command("run")["ok"] == 1
        self.source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)

    def start_tool(self, *options: str) -> Tool:
        """Start the tool on the destination, and wait until the tool is ready."""
        return start_incoming_tool(self.target, *options)

    def start(self) -> None:
        self.source.qmp("migrate", uri=self.uri)

    def finish(self) -> None:
        """Wait until the source has completed the migration."""
        wait_migrated(self.source)

    def faults(self) -> int:
        """Stop the guest's workload and return the faults on the destination."""
        assert self.target.command("stop")["bad"] == 0
        check_memory(self.target)
        return faults(self.target)


class MakeMigration(Protocol):
    """A function that prepares a migration, with options for the destination."""

    def __call__(self, **options: Unpack[GuestOptions]) -> Migration: ...


@pytest.fixture
def make_migration(make_restored_guest: MakeGuest, tmp_path: Path) -> Iterator[MakeMigration]:
    made: list[Migration] = []

    def make(**options: Unpack[GuestOptions]) -> Migration:
        made.append(Migration(make_restored_guest(workload_mib=WORKLOAD_MIB), tmp_path, **options))
        return made[-1]

    yield make
    for migration in made:
        migration.target.kill()


@pytest.mark.every_kernel
def test_migrated_guest_takes_no_faults(make_migration: MakeMigration) -> None:
    plain = make_migration()
    plain.start()
    plain.finish()
    without = plain.faults()
    assert without >= PAGES  # without the tool, each page causes a fault

    migration = make_migration()
    tool = migration.start_tool()
    migration.start()
    migration.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert migration.target.status() == "running"
    assert migration.faults() <= without / 100
    assert result.report["bytes"]["remaining"] == 0
    assert result.report["seconds"]["paused"] >= result.report["seconds"]["prefault"]
    assert "firmware-ahead" not in result.warnings
    assert leftovers(migration.target.pid) == []


@pytest.mark.full
@pytest.mark.parametrize("options", [(), ("--cont",)], ids=["plain", "cont"])
def test_paused_target_is_resumed_only_with_cont(
    make_migration: MakeMigration, options: tuple[str, ...]
) -> None:
    migration = make_migration(paused=True)
    tool = migration.start_tool(*options)
    migration.start()
    migration.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert migration.target.status() == ("running" if options else "paused")
    migration.target.qmp("cont")
    assert migration.faults() <= PAGES / 100


def test_downtime_is_bounded(make_migration: MakeMigration) -> None:
    migration = make_migration()
    tool = migration.start_tool("--max-downtime", "0.05", "--chunk", "4M")
    migration.start()
    migration.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    seconds = result.report["seconds"]
    assert seconds["longest_pause"] < seconds["paused"]  # there was more than one pause
    assert result.report["bytes"]["remaining"] == 0
    assert migration.target.stats()["pages_4k"] << 12 >= result.report["bytes"]["requested"]
    assert migration.target.command("stop")["bad"] == 0


def test_cancelled_migration_keeps_source_running(make_migration: MakeMigration) -> None:
    migration = make_migration()
    tool = migration.start_tool()
    migration.source.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    migration.start()
    while migration.source.qmp("query-migrate")["status"] != "active":
        migration.source.wait_event("MIGRATION")
    migration.source.qmp("migrate_cancel")
    result = tool.finish()
    assert result.status == 1
    assert result.error["code"] == "migration-failed"
    assert migration.source.status() == "running"
    assert migration.source.command("stop")["bad"] == 0


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_guest_starts_if_waiting_tool_dies(
    make_migration: MakeMigration, number: signal.Signals
) -> None:
    migration = make_migration()
    tool = migration.start_tool()
    tool.send_signal(number)
    assert not tool.running(30)
    wait_clean(migration.target.pid)
    migration.start()
    migration.finish()
    migration.target.wait_event("RESUME")
    assert migration.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_guest_starts_if_prefaulting_tool_dies(make_migration: MakeMigration) -> None:
    migration = make_migration()
    tool = migration.start_tool("--chunk", "4096")
    migration.start()
    migration.finish()
    wait_for(lambda: migration.target.stats()["pages_4k"] > 1000, "the tool prefaults")
    tool.send_signal(signal.SIGKILL)
    migration.target.wait_event("RESUME")
    assert migration.target.command("stop")["bad"] == 0
    wait_clean(migration.target.pid)
    assert prefault(migration.target).status == 0


@pytest.mark.full
def test_resume_during_prefault_fails(make_migration: MakeMigration) -> None:
    migration = make_migration()
    tool = migration.start_tool("--chunk", "4096")
    migration.start()
    migration.finish()
    wait_for(lambda: migration.target.stats()["pages_4k"] > 1000, "the tool prefaults")
    migration.target.qmp("cont")
    result = tool.finish()
    assert result.status == 1
    assert result.error["code"] == "resumed"
    assert migration.target.status() == "running"
    assert migration.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_cont_before_arrival(make_migration: MakeMigration) -> None:
    """Run ``cont`` while the tool waits for the guest.

    ``cont`` cancels the tool's ``stop``, so the tool prefaults the guest while the guest runs.
    """
    migration = make_migration()
    tool = migration.start_tool()
    migration.target.qmp("cont")
    migration.start()
    migration.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert migration.target.status() == "running"
    assert result.report["bytes"]["remaining"] == 0
    assert migration.target.stats()["pages_4k"] << 12 >= result.report["bytes"]["requested"]
    assert migration.target.command("stop")["bad"] == 0


@pytest.mark.full
def test_unresponsive_qemu_is_waited_for(make_migration: MakeMigration) -> None:
    """Suspend QEMU's main thread for 40 s, longer than the usual time limit of 30 s for replies.

    QEMU may not reply for minutes while it loads a guest from a slow file. The threads that
    populate the guest run meanwhile.
    """
    migration = make_migration()
    tool = migration.start_tool()
    with suspended_thread(migration.target.pid):
        assert tool.running(40)
    migration.start()
    migration.finish()
    result = tool.finish()
    assert result.status == 0, (result.stdout, result.stderr)
    assert migration.faults() <= PAGES / 100


@pytest.mark.parametrize(
    ("how", "backing"),
    [
        ("file", "ram"),
        ("mapped-ram", "file-private"),
        pytest.param("file", "file-private", marks=pytest.mark.full),
        pytest.param("mapped-ram", "ram", marks=pytest.mark.full),
    ],
)
def test_restore_from_file(
    make_restored_guest: MakeGuest, tmp_path: Path, how: str, backing: str
) -> None:
    state = tmp_path / "state"
    capabilities = [{"capability": "mapped-ram", "state": how == "mapped-ram"}]
    source = make_restored_guest(workload_mib=WORKLOAD_MIB)
    source.qmp("migrate-set-capabilities", capabilities=capabilities)
    source.save(state)
    with Guest(memory_mib=MEMORY_MIB, incoming="defer", backing=backing) as guest:
        guest.qmp("migrate-set-capabilities", capabilities=capabilities)
        tool = start_incoming_tool(guest)
        guest.qmp("migrate-incoming", uri=f"file:{state}")
        result = tool.finish()
        assert result.status == 0, (result.stdout, result.stderr)
        check_memory(guest)
        assert faults(guest) <= PAGES / 100


def test_loadvm(tmp_path: Path) -> None:
    """Prefault after ``loadvm``, which resets the machine and drops stage-2 tables.

    See load_snapshot() in QEMU's migration/savevm.c.
    """
    with Guest(workload_mib=WORKLOAD_MIB, memory_mib=MEMORY_MIB) as guest:
        add_disk(guest, tmp_path / "disk")
        guest.wait_ready()
        check_memory(guest)
        run_job(guest, "snapshot-save", **SNAPSHOT)
        check_memory(guest)

        def load() -> int:
            guest.qmp("stop")
            run_job(guest, "snapshot-load", **SNAPSHOT)
            return faults(guest)

        before = load()
        guest.qmp("cont")
        check_memory(guest)
        without = faults(guest) - before

        before = load()
        result = prefault(guest, "--cont")
        assert result.status == 0, (result.stdout, result.stderr)
        check_memory(guest)
        print(f"faults after loadvm: {without}, prefaulted: {faults(guest) - before}")
        assert faults(guest) - before <= max(without, PAGES) / 100
