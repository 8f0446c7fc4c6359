# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the scripts in qmp_scripts/ with the real ioctl."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault.host.kvm import pre_fault_capability
from qemu_prefault_lab.guest import Guest
from support.guest import OTHER_MIB, MakeGuest, MakeSavedState, check_memory, faults, prefault

pytestmark = pytest.mark.any_agent

SCRIPTS = next(p for d in Path(__file__).parents if (p := d / "qmp_scripts").is_dir())
WORKLOAD_MIB = 32
PAGES = WORKLOAD_MIB << 8

CAPABILITY = pre_fault_capability()
needs_ioctl = pytest.mark.skipif(CAPABILITY.available is not True, reason=CAPABILITY.reason)


def run_script(name: str, guest: Guest, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script and check that its output contains no traceback."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, guest.qmp_path, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    return done


# --- prefault-and-cont ---


@needs_ioctl
def test_prefault_and_cont(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(workload_mib=WORKLOAD_MIB)
    done = run_script("prefault-and-cont", guest)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("started\n") and "verified: all" in done.stdout
    assert guest.status() == "running"
    check_memory(guest)
    assert faults(guest) <= PAGES / 1000  # one per page without prefaulting


@pytest.mark.full
@needs_ioctl
def test_partial_prefault_does_not_start_guest() -> None:
    with Guest(machine="microvm", backing="file", memory_mib=128, paused=True) as guest:
        os.truncate(guest.directory / "memory", 96 << 20)
        done = run_script("prefault-and-cont", guest, "--populate", "all")
        assert done.returncode == 3
        assert "PARTIAL: 32.0 MiB" in done.stdout
        assert "the guest was not started" in done.stderr
        assert guest.stats()["pages_4k"] >= (96 << 8) - 256
        assert guest.status() == "prelaunch"


# --- prefault-incoming, prefault-restore ---


@pytest.mark.full
@needs_ioctl
def test_prefault_incoming(tmp_path: Path) -> None:
    memory_mib = WORKLOAD_MIB + OTHER_MIB
    uri = f"unix:{tmp_path / 'migration'}"
    with (
        Guest(workload_mib=WORKLOAD_MIB, memory_mib=memory_mib) as source,
        Guest(memory_mib=memory_mib, incoming="defer") as target,
    ):
        source.wait_ready()
        command = [
            sys.executable,
            "-u",
            str(SCRIPTS / "prefault-incoming"),
            str(target.qmp_path),
            uri,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
            assert script.stdout
            assert script.stdout.readline() == f"listening on {uri}\n"
            source.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
            source.qmp("migrate", uri=uri)
            assert "verified: all" in script.stdout.read()
        assert script.returncode == 0
        assert target.status() == "running"
        check_memory(target)
        assert faults(target) <= PAGES / 100


@pytest.mark.full
@needs_ioctl
def test_prefault_restore(make_saved_state: MakeSavedState) -> None:
    state = make_saved_state(1, WORKLOAD_MIB, False)
    with Guest(memory_mib=WORKLOAD_MIB + OTHER_MIB, incoming="defer") as guest:
        done = run_script("prefault-restore", guest, str(state))
        assert done.returncode == 0, done.stderr
        assert "verified: all" in done.stdout
        assert guest.status() == "running"
        check_memory(guest)
        assert faults(guest) <= PAGES / 100


@pytest.mark.full
def test_missing_snapshot() -> None:
    with Guest(machine="microvm", memory_mib=128) as guest:
        done = run_script("prefault-restore", guest, "--loadvm", "none")
        assert done.returncode == 1
        assert "could not load snapshot none" in done.stderr
        assert guest.status() == "paused"


# --- vcpu-fds ---


@needs_ioctl
@pytest.mark.parametrize(
    "running", [False, pytest.param(True, marks=pytest.mark.full)], ids=["stopped", "running"]
)
def test_vcpu_fds_give_eio(make_restored_guest: MakeGuest, running: bool) -> None:
    """Check that the ioctl fails with EIO if a process other than QEMU calls it."""
    guest = make_restored_guest(smp=2, workload_mib=WORKLOAD_MIB)
    if running:
        guest.qmp("cont")
        # KVM_RUN holds vcpu->mutex, so an ioctl that waits for this mutex would hang.
        guest.command("run")
    before = guest.stats()["pages_4k"]
    done = run_script("vcpu-fds", guest)
    assert done.returncode == 0, done.stderr
    assert "= EIO\n" in done.stdout and "kvm->mm" in done.stdout
    assert "cannot prefault from any process" not in done.stdout
    if running:
        assert guest.command("stop")["bad"] == 0
    else:
        assert guest.stats()["pages_4k"] == before == 0
    assert prefault(guest).status == 0


@pytest.mark.unsupported
@pytest.mark.skipif(CAPABILITY.available is True, reason="this KVM has KVM_PRE_FAULT_MEMORY")
def test_vcpu_fds_give_eio_where_unsupported() -> None:
    """Check that the ioctl fails with EIO on a KVM that does not support it.

    kvm_vcpu_ioctl() (virt/kvm/kvm_main.c) checks the calling process before the request.
    """
    with Guest(machine="microvm", memory_mib=128, paused=True) as guest:
        done = run_script("vcpu-fds", guest)
        assert done.returncode == 0, done.stderr
        assert "= EIO\n" in done.stdout and "kvm->mm" in done.stdout
        assert f"cannot prefault from any process: {CAPABILITY.reason}" in done.stdout
        assert guest.status() == "prelaunch"


# --- watch-stage2 ---


@dataclass(frozen=True)
class Row:
    """One line of watch-stage2's output."""

    pages_4k: int
    growth: str
    faults_per_second: str

    @classmethod
    def parse(cls, line: str) -> Row:
        pages_4k, _, _, growth, unit, faults_per_second = line.split()
        return cls(int(pages_4k), f"{growth} {unit}", faults_per_second)


StartWatch = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start_watch() -> Iterator[StartWatch]:
    """Return a function that starts watch-stage2 and waits for its header."""
    watching: list[subprocess.Popen[str]] = []

    def start(socket: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPTS / "watch-stage2"), "--interval", "0.2", socket]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watching.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().split()[0] == "pages_4k"
        return process

    yield start
    for process in watching:
        process.kill()
        process.communicate()


def rows_until(process: subprocess.Popen[str], condition: Callable[[Row], bool]) -> list[Row]:
    """Return the rows up to and including the first one that meets a condition."""
    assert process.stdout is not None
    rows: list[Row] = []
    for line in process.stdout:
        rows.append(Row.parse(line))
        if condition(rows[-1]):
            return rows
    raise AssertionError(f"watch-stage2 exited after {rows}")


@pytest.mark.full
@needs_ioctl
def test_watch_stage2(
    make_restored_guest: MakeGuest, start_watch: StartWatch, tmp_path: Path
) -> None:
    """Check that the script distinguishes prefaulting from faults of a vCPU."""
    sockets = [str(tmp_path / f"watch{number}") for number in range(2)]
    prefaulted, left_alone = (
        make_restored_guest(
            workload_mib=WORKLOAD_MIB, args=["-qmp", f"unix:{socket},server=on,wait=off"]
        )
        for socket in sockets
    )

    watching = start_watch(sockets[0])
    assert prefault(prefaulted).status == 0
    rows = rows_until(watching, lambda row: row.pages_4k >= PAGES)
    assert rows[0] == Row(0, "+0 B", "-")
    assert any(row.growth.startswith("+") and row.growth != "+0 B" for row in rows)
    assert {row.faults_per_second for row in rows[1:]} == {"0"}
    prefaulted.kill()
    assert watching.communicate(timeout=60)[0].endswith("QEMU has exited\n")
    assert watching.returncode == 0

    watching = start_watch(sockets[1])
    left_alone.qmp("cont")
    check_memory(left_alone)
    rows = rows_until(watching, lambda row: row.pages_4k >= PAGES)
    assert rows[0].pages_4k == 0
    assert any(float(row.faults_per_second) >= 100 for row in rows[1:] if row.growth != "+0 B")
