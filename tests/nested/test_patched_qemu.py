# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the patched QEMU's prefault job, ``prefault=on`` and TCG fixes (patches/).

With ``--agents qmp``, the other test files run the tool with the patched QEMU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault_lab.guest import Guest, defaults, patched_qemu
from support.guest import (
    OTHER_MIB,
    SNAPSHOT,
    MakeGuest,
    add_disk,
    check_memory,
    faults,
    faults_of_pass,
    plug_dimm,
    prefault,
    ram_hva,
    ram_resident,
    run_job,
    start_tool,
)
from support.process import leftovers, resident_bytes

MIB = 1 << 20
WORKLOAD_MIB = 256
pytestmark = [
    pytest.mark.patched_qemu,
    pytest.mark.skipif(
        patched_qemu() is None,
        reason="no patched QEMU is installed (lab pytest --qemu installs one)",
    ),
]


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    before = defaults.qemu
    defaults.qemu = patched_qemu() or before
    yield
    defaults.qemu = before


def run_prefault_job(guest: Guest, **arguments: Any) -> list[dict[str, Any]]:
    """Run the job until it ends, and return the result of each range."""
    guest.qmp("x-kvm-prefault-memory", job_id="job", **arguments)
    ranges = wait_prefault_job(guest)
    guest.qmp("job-dismiss", id="job")
    return ranges


def wait_prefault_job(guest: Guest) -> list[dict[str, Any]]:
    while guest.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
        pass
    ranges: list[dict[str, Any]] = guest.qmp("x-query-kvm-prefault", job_id="job")["ranges"]
    return ranges


def total(ranges: list[dict[str, Any]], what: str) -> int:
    return sum(int(part[what]) for part in ranges)


# --- the job ---


@pytest.mark.parametrize("smp", [1, 2])
def test_job_prefaults_restored_guest(make_restored_guest: MakeGuest, smp: int) -> None:
    guest = make_restored_guest(workload_mib=64, smp=smp)
    ranges = run_prefault_job(guest)
    assert not any("error" in part for part in ranges)
    assert total(ranges, "mapped") == total(ranges, "size")
    guest.qmp("cont")
    assert faults_of_pass(guest) <= 16


def test_job_does_not_stop_guest() -> None:
    with Guest(machine="microvm", workload_mib=32, memory_mib=128) as guest:
        guest.wait_ready()
        ranges = run_prefault_job(guest)
        assert guest.status() == "running"
        assert total(ranges, "mapped") == total(ranges, "size") >= 127 * MIB
        assert guest.stats()["pages_4k"] * 4096 >= 127 * MIB
        check_memory(guest)


def test_cancelled_job_reports_progress(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(workload_mib=256)
    guest.qmp("x-kvm-prefault-memory", job_id="job", chunk_size=1 * MIB)
    guest.qmp("job-cancel", id="job")
    ranges = wait_prefault_job(guest)
    assert total(ranges, "mapped") < total(ranges, "size")
    guest.qmp("job-dismiss", id="job")
    assert guest.qmp("query-jobs") == []
    ranges = run_prefault_job(guest)  # a second job must work
    assert total(ranges, "mapped") == total(ranges, "size")


def test_job_is_refused_during_dirty_logging() -> None:
    with Guest(machine="microvm", workload_mib=32, memory_mib=128) as guest:
        guest.wait_ready()
        guest.qmp("calc-dirty-rate", calc_time=20, mode="dirty-bitmap")
        while guest.qmp("query-dirty-rate")["status"] != "measuring":
            guest.command("echo measuring")
        with pytest.raises(Exception, match="dirty pages are being logged"):
            guest.qmp("x-kvm-prefault-memory", job_id="job")


def test_absent_memory_stays_absent() -> None:
    device = "virtio-mem-pci,id=vmem0,memdev=vm0,requested-size=128M"
    args = ["-object", "memory-backend-ram,id=vm0,size=256M", "-device", device]
    args += ["-device", "virtio-balloon-pci,id=balloon0"]
    with Guest(
        memory_mib=256,
        memory="maxmem=1G",
        workload_mib=32,
        kernel_args="memhp_default_state=online",
        args=args,
    ) as guest:
        guest.wait_ready()
        guest.command("modules")
        while guest.qmp("query-memory-devices")[0]["data"]["size"] != 128 * MIB:
            guest.wait_event("MEMORY_DEVICE_SIZE_CHANGE")
        guest.qmp("balloon", value=192 * MIB)
        while guest.qmp("query-balloon")["actual"] != 192 * MIB:
            guest.wait_event("BALLOON_CHANGE")
        guest.qmp("stop")
        blocks = guest.qmp("x-query-ramblock")["human-readable-text"].splitlines()
        hva = int(next(line for line in blocks if "vm0" in line).split()[-2], 16)
        before = ram_resident(guest), resident_bytes(guest.pid, hva)
        ranges = run_prefault_job(guest)
        after = ram_resident(guest), resident_bytes(guest.pid, hva)
        print(f"resident bytes in RAM and virtio-mem: {before} before, {after} after")
        assert after == before
        absent = sum(part["absent"] for part in ranges if part["memdev"] == "vm0")
        assert absent >= 128 * MIB
        run_prefault_job(guest, memdevs=["vm0"], populate="all")
        assert resident_bytes(guest.pid, hva) == 128 * MIB


def test_monitor_commands(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest()
    assert guest.hmp("kvm_prefault ram") == ""
    while guest.hmp("info kvm_prefault").count("\n") > 1 and guest.qmp("query-jobs"):
        pass
    assert guest.stats()["pages_4k"] * 4096 >= 100 * MIB
    assert "no memory backend" in guest.hmp("kvm_prefault nowhere")


# --- -accel kvm,prefault=on ---


def wait_all_prefaulted(guest: Guest) -> dict[str, Any]:
    """Wait until QEMU has prefaulted a running guest and return QEMU's reply."""
    deadline = time.monotonic() + 60
    while (info := guest.qmp("x-query-kvm-prefault"))["pending"]:
        assert time.monotonic() < deadline, info
        guest.command("echo idle")
    answer: dict[str, Any] = info
    return answer


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_boot_takes_few_faults(machine: str) -> None:
    with Guest(machine=machine, accel="kvm,prefault=on", workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        print(f"{machine}: {faults(guest)} faults until {WORKLOAD_MIB} MiB were written")
        assert faults(guest) <= 0.0005 * WORKLOAD_MIB * 256
        assert wait_all_prefaulted(guest)["keep"]
        check_memory(guest)


def test_reset_takes_few_faults() -> None:
    with Guest(accel="kvm,prefault=on", workload_mib=64, args=["-action", "reboot=reset"]) as guest:
        guest.wait_ready()
        before = faults(guest)
        guest.reset()
        guest.wait_ready()
        assert faults(guest) - before <= 64
        check_memory(guest)


def test_restored_guest_is_prefaulted(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(workload_mib=64, accel="kvm,prefault=on")
    guest.qmp("cont")
    assert faults_of_pass(guest) <= 16


def test_incoming_guest_is_prefaulted(make_restored_guest: MakeGuest, tmp_path: Path) -> None:
    """Check that QEMU prefaults an incoming guest before starting the guest."""
    source = make_restored_guest(workload_mib=64)
    source.qmp("cont")
    source.command("run")
    uri = f"unix:{tmp_path / 'migration'}"
    memory_mib = 64 + OTHER_MIB
    with Guest(memory_mib=memory_mib, accel="kvm,prefault=on", incoming=uri) as target:
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
        source.qmp("migrate", uri=uri)
        target.wait_event("RESUME")
        assert target.command("stop")["bad"] == 0
        assert faults(target) <= 64
        assert faults_of_pass(target) <= 16


def test_loaded_snapshot_is_prefaulted(tmp_path: Path) -> None:
    with Guest(accel="kvm,prefault=on", workload_mib=64, memory_mib=160) as guest:
        add_disk(guest, tmp_path / "disk")
        guest.wait_ready()
        run_job(guest, "snapshot-save", **SNAPSHOT)
        for _ in range(2):
            check_memory(guest)
            guest.qmp("stop")
            run_job(guest, "snapshot-load", **SNAPSHOT)
            before = faults(guest)
            guest.qmp("cont")
            check_memory(guest)
            assert faults(guest) - before <= 64


def test_plugged_dimm_is_prefaulted() -> None:
    with Guest(accel="kvm,prefault=on", memory="slots=2,maxmem=2G", workload_mib=32) as guest:
        guest.wait_ready()
        wait_all_prefaulted(guest)
        before = guest.stats()["pages_4k"]
        plug_dimm(guest, 64 * MIB)
        wait_all_prefaulted(guest)
        assert guest.stats()["pages_4k"] - before >= 64 * 256
        check_memory(guest)


# --- the tool ---


def test_tool_uses_job_without_ptrace(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(workload_mib=64)
    tool = start_tool(guest, "--cont")
    while tool.running():
        status = Path(f"/proc/{guest.pid}/status").read_text()
        assert "TracerPid:\t0" in status
        assert leftovers(guest.pid) == []
    result = tool.finish()
    assert result.status == 0, result.stderr
    assert result.report["agent"] == "qmp"
    assert result.report["bytes"]["remaining"] == 0
    assert guest.qmp("query-jobs") == []
    assert faults_of_pass(guest) <= 64


def test_stale_job_is_cancelled(make_restored_guest: MakeGuest) -> None:
    guest = make_restored_guest(workload_mib=64)
    tool = start_tool(guest, "--chunk", "4096")
    while guest.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "running":
        pass
    tool.send_signal(signal.SIGKILL)
    assert not tool.running(10)
    assert len(guest.qmp("query-jobs")) == 1
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert result.report["bytes"]["remaining"] == 0
    assert guest.qmp("query-jobs") == []


def test_stock_qemu_is_refused() -> None:
    with Guest(qemu=["qemu-system-x86_64"], machine="microvm", paused=True) as guest:
        result = prefault(guest, "--agent", "qmp")
        assert result.status == 4
        assert result.error["code"] == "no-qmp-command"
        assert ram_hva(guest)


# --- QEMU's own tests ---


def test_qtest(tmp_path: Path) -> None:
    (binary, *firmware) = patched_qemu() or [""]
    wrapper = tmp_path / "qemu-system-x86_64"  # adds -L, which the test does not pass
    wrapper.write_text(f'#!/bin/sh\nexec {binary} {" ".join(firmware)} "$@"\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "QTEST_QEMU_BINARY": str(wrapper)}
    result = subprocess.run(
        [f"{binary}-test", "--tap"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "virtio-mem" in result.stdout  # only tests with KVM print this


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("test", ["svm-cr-read", "svm-cr8-write"])
def test_tcg_svm_intercepts(test: str, fixed: bool, tmp_path: Path) -> None:
    """Test that the patched QEMU intercepts CR reads and allows CR8 writes."""
    (binary, *firmware) = patched_qemu() or [""]
    kernel = f"{binary}-{test}"
    command = [binary, *firmware] if fixed else ["qemu-system-x86_64"]
    output = tmp_path / "output"
    result = subprocess.run(
        [*command, "-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "max",
         "-chardev", f"file,path={output},id=output", "-device", "isa-debugcon,chardev=output",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel", kernel],
        check=False, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if fixed or test == "svm-cr-read":
        assert ("PASSED" if fixed else "FAILED") in output.read_text()
    else:
        assert result.returncode == -signal.SIGABRT
