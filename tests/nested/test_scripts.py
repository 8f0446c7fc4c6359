# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripts of qmp_scripts/ where the ioctl is real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault.kvm import pre_fault_capability
from qemu_prefault_lab.guest import Guest
from support.guest import OTHER_MIB, faults, prefault

pytestmark = pytest.mark.any_agent

SCRIPTS = next(p for d in Path(__file__).parents if (p := d / "qmp_scripts").is_dir())
WORKLOAD_MIB = 32
PAGES = WORKLOAD_MIB << 8

CAPABILITY = pre_fault_capability()
needs_ioctl = pytest.mark.skipif(CAPABILITY.available is not True, reason=CAPABILITY.reason)


def run(name: str, guest: Guest, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; nothing it does may show a user a traceback."""
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
def test_what_it_starts_takes_no_faults(restored):
    vm = restored(workload_mib=WORKLOAD_MIB)
    done = run("prefault-and-cont", vm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("started\n") and "verified: all" in done.stdout
    assert vm.status() == "running"
    assert vm.command("pass")["bad"] == 0
    assert faults(vm) <= PAGES / 1000  # one per page, without


@pytest.mark.full
@needs_ioctl
def test_what_is_not_complete_is_not_started():
    with Guest(machine="microvm", backing="file", memory_mib=128, paused=True) as vm:
        os.truncate(vm.directory / "memory", 96 << 20)
        done = run("prefault-and-cont", vm, "--populate", "all")
        assert done.returncode == 3
        assert "PARTIAL: 32.0 MiB" in done.stdout
        assert "the guest was not started" in done.stderr
        assert vm.stats()["pages_4k"] >= (96 << 8) - 256
        assert vm.status() == "prelaunch"


# --- prefault-incoming, prefault-restore ---


@pytest.mark.full
@needs_ioctl
def test_a_target_that_listens_when_all_is_ready(tmp_path):
    memory_mib = WORKLOAD_MIB + OTHER_MIB
    uri = f"unix:{tmp_path / 'migration'}"
    with (
        Guest(workload_mib=WORKLOAD_MIB, memory_mib=memory_mib) as source,
        Guest(memory_mib=memory_mib, incoming="defer") as target,
    ):
        source.wait_ready()
        command = [sys.executable, "-u", SCRIPTS / "prefault-incoming", target.qmp_path, uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
            assert script.stdout
            assert script.stdout.readline() == f"listening at {uri}\n"
            source.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
            source.qmp("migrate", uri=uri)
            assert "verified: all" in script.stdout.read()
        assert script.returncode == 0
        assert target.status() == "running"
        assert target.command("pass")["bad"] == 0
        assert faults(target) <= PAGES / 100


@pytest.mark.full
@needs_ioctl
def test_a_guest_restored_from_a_file(saved_state):
    state = saved_state(1, WORKLOAD_MIB, False)
    with Guest(memory_mib=WORKLOAD_MIB + OTHER_MIB, incoming="defer") as guest:
        done = run("prefault-restore", guest, str(state))
        assert done.returncode == 0, done.stderr
        assert "verified: all" in done.stdout
        assert guest.status() == "running"
        assert guest.command("pass")["bad"] == 0
        assert faults(guest) <= PAGES / 100


@pytest.mark.full
def test_a_snapshot_that_is_not_there():
    with Guest(machine="microvm", memory_mib=128) as guest:
        done = run("prefault-restore", guest, "--loadvm", "none")
        assert done.returncode == 1
        assert "could not load it" in done.stderr
        assert guest.status() == "paused"


# --- vcpu-fds ---


@needs_ioctl
@pytest.mark.parametrize(
    "running", [False, pytest.param(True, marks=pytest.mark.full)], ids=["stopped", "running"]
)
def test_the_handover_gives_eio_where_the_ioctl_works(restored, running):
    """Nothing else is in its way: the kernel has the ioctl, and QEMU's own threads may."""
    vm = restored(smp=2, workload_mib=WORKLOAD_MIB)
    if running:
        vm.qmp("cont")
        vm.command("run")  # KVM_RUN holds vcpu->mutex now; whoever waited for it would hang
    before = vm.stats()["pages_4k"]
    done = run("vcpu-fds", vm)
    assert done.returncode == 0, done.stderr
    assert "= EIO\n" in done.stdout and "kvm->mm" in done.stdout
    assert "could here anyway" not in done.stdout
    if running:
        assert vm.command("stop")["bad"] == 0
    else:
        assert vm.stats()["pages_4k"] == before == 0
    assert prefault(vm).status == 0


@pytest.mark.unsupported
@pytest.mark.skipif(CAPABILITY.available is True, reason="KVM_PRE_FAULT_MEMORY works here")
def test_the_handover_gives_eio_where_the_ioctl_is_unsupported():
    """EIO, not ENOTTY or EOPNOTSUPP: KVM asks who the caller is before it asks what for."""
    with Guest(machine="microvm", memory_mib=128, paused=True) as vm:
        done = run("vcpu-fds", vm)
        assert done.returncode == 0, done.stderr
        assert "= EIO\n" in done.stdout and "kvm->mm" in done.stdout
        assert f"could here anyway: {CAPABILITY.reason}" in done.stdout
        assert vm.status() == "prelaunch"


# --- watch-stage2 ---


@dataclass(frozen=True)
class Row:
    """A line of watch-stage2."""

    pages_4k: int
    growth: str
    faults_per_second: str

    @classmethod
    def parse(cls, line: str) -> Row:
        pages_4k, _, _, growth, unit, faults_per_second = line.split()
        return cls(int(pages_4k), f"{growth} {unit}", faults_per_second)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts watch-stage2 on a socket; returns when it has shown its header."""
    watching: list[subprocess.Popen[str]] = []

    def start(socket: str) -> subprocess.Popen[str]:
        command = [sys.executable, SCRIPTS / "watch-stage2", "--interval", "0.2", socket]
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
    """The lines up to the first that is as wanted."""
    assert process.stdout is not None
    rows = []
    for line in process.stdout:
        rows.append(Row.parse(line))
        if condition(rows[-1]):
            return rows
    raise AssertionError(f"it has ended, after {rows}")


@pytest.mark.full
@needs_ioctl
def test_watch_shows_the_tables_fill_and_who_pays(restored, watch, tmp_path):
    """Once by the prefault, which costs no fault; once by the vCPU, a fault for each page."""
    sockets = [str(tmp_path / f"watch{number}") for number in range(2)]
    prefaulted, left_alone = (
        restored(workload_mib=WORKLOAD_MIB, args=["-qmp", f"unix:{socket},server=on,wait=off"])
        for socket in sockets
    )

    watching = watch(sockets[0])
    assert prefault(prefaulted).status == 0
    rows = rows_until(watching, lambda row: row.pages_4k >= PAGES)
    assert rows[0] == Row(0, "+0 B", "-")
    assert any(row.growth.startswith("+") and row.growth != "+0 B" for row in rows)
    assert {row.faults_per_second for row in rows[1:]} == {"0"}
    prefaulted.kill()
    assert watching.communicate(timeout=60)[0].endswith("QEMU has ended\n")
    assert watching.returncode == 0

    watching = watch(sockets[1])
    left_alone.qmp("cont")
    assert left_alone.command("pass")["bad"] == 0
    rows = rows_until(watching, lambda row: row.pages_4k >= PAGES)
    assert rows[0].pages_4k == 0
    assert any(float(row.faults_per_second) >= 100 for row in rows[1:] if row.growth != "+0 B")
