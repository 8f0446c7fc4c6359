# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the CPUs, cgroups and scheduling of helpers.

Helpers must run as ordinary threads, even if the threads that can start helpers are real-time,
pinned, or in separate cgroups.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault.agents.qemu_process import helper_threads
from qemu_prefault.host.proc_files import stat_fields
from qemu_prefault_lab.wait import wait_for
from support.limits import cgroups, in_group
from support.process import leftovers, other_threads
from support.qemu import QemuVm, StartQemu, start_tool, start_vm
from support.tool import Result

#: A boot sector that writes "B" to the debug console, and then jumps to itself.
BUSY_BOOT_SECTOR = b"\xb0B\xe6\xe9\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")


@dataclass
class Seen:
    """The scheduling policy, nice value, CPUs and cgroups of a helper."""

    policy: int
    nice: int
    cpus: set[int]
    groups: str


def busy_vm(start_qemu: StartQemu, tmp_path: Path, *arguments: str) -> tuple[QemuVm, int]:
    """Return a QEMU whose vCPU never halts, and the vCPU's thread id.

    The guest's firmware has finished. While it ran, the vCPU often held QEMU's lock.
    """
    disk, console = tmp_path / "disk", tmp_path / "console"
    disk.write_bytes(BUSY_BOOT_SECTOR)
    drive = ("-drive", f"file={disk},format=raw,if=ide,snapshot=on")
    debug = ("-chardev", f"file,id=debug,path={console}",
             "-device", "isa-debugcon,iobase=0xe9,chardev=debug")  # fmt: skip
    vm = start_vm(start_qemu, tmp_path, "-m", "512M", *drive, *debug, *arguments, paused=False)
    wait_for(lambda: console.read_bytes() == b"B", "the boot sector runs", 60)
    return vm, vm.vcpu


def starters(vm: QemuVm, vcpu: int) -> list[int]:
    """Return the threads that can start helpers."""
    return [vcpu, *other_threads(vm.pid, vcpu)]


def populate_and_sample(vm: QemuVm) -> tuple[Result, list[Seen]]:
    """Populate the guest, and return the result and the last sample of each helper.

    Earlier samples may show properties that the tool has not changed yet.
    """
    seen: dict[int, Seen] = {}
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "65536")
    while tool.running():
        for tid in helper_threads(vm.pid):
            try:
                seen[tid] = Seen(
                    os.sched_getscheduler(tid),
                    os.getpriority(os.PRIO_PROCESS, tid),
                    set(os.sched_getaffinity(tid)),
                    Path(f"/proc/{vm.pid}/task/{tid}/cgroup").read_text(),
                )
            except (ProcessLookupError, FileNotFoundError):
                continue
        time.sleep(0.002)
    return tool.finish(), list(seen.values())


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_RR, os.SCHED_BATCH, os.SCHED_IDLE])
def test_helper_has_ordinary_scheduling(start_qemu: StartQemu, tmp_path: Path, policy: int) -> None:
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("this test needs two CPUs")
    vm, vcpu = busy_vm(start_qemu, tmp_path)
    real_time = policy in (os.SCHED_FIFO, os.SCHED_RR)
    for tid in starters(vm, vcpu):
        # QEMU's other threads must be able to serve the monitor on the CPU of the busy vCPU.
        other = tid != vcpu
        own_policy = os.SCHED_BATCH if other and policy == os.SCHED_IDLE else policy
        priority = (2 if other else 1) if real_time else 0
        os.sched_setaffinity(tid, {max(every)})
        try:
            if not real_time:
                os.setpriority(os.PRIO_PROCESS, tid, 5)
            os.sched_setscheduler(tid, own_policy, os.sched_param(priority))
        except PermissionError:
            pytest.skip("needs CAP_SYS_NICE")
    result, seen = populate_and_sample(vm)
    assert result.status == 0, result.stderr
    assert result.report["warnings"] == []
    assert seen
    for helper in seen:
        assert helper.policy == os.SCHED_OTHER
        assert helper.nice == 0
        assert helper.cpus == every - ({max(every)} if real_time else set())
    assert os.sched_getscheduler(vcpu) == policy
    assert os.sched_getaffinity(vcpu) == {max(every)}
    assert leftovers(vm.pid) == []


def test_stall_is_reported_with_reason(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_vm(start_qemu, tmp_path, "-m", "512M")
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    while tool.running() and not helper_threads(vm.pid):
        time.sleep(0.001)
    time.sleep(0.1)
    vm.qemu.pause()
    time.sleep(2.6)
    assert tool.has_said("no progress for 2 s: QEMU is stopped")
    vm.qemu.resume()
    result = tool.finish()
    assert result.status == 0, result.stderr
    assert result.warnings == {"no-progress"}


@pytest.fixture
def cpu_group() -> Iterator[Path]:
    group = CPU_GROUPS / f"prefault-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("cannot create a cgroup with the cpu controller")
    yield group
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.05)


def test_helper_leaves_the_vcpu_cgroup(
    start_qemu: StartQemu, tmp_path: Path, cpu_group: Path
) -> None:
    vm, vcpu = busy_vm(start_qemu, tmp_path)
    for tid in starters(vm, vcpu):
        (cpu_group / "tasks").write_text(str(tid))
    result, seen = populate_and_sample(vm)
    assert result.status == 0, result.stderr
    wanted = Path(f"/proc/{vm.pid}/task/{vm.pid}/cgroup").read_text()
    assert seen and {helper.groups for helper in seen} == {wanted}
    assert Path(f"/proc/{vm.pid}/task/{vcpu}/cgroup").read_text() != wanted
    vm.qemu.kill()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, including those that have exited."""
    fields = stat_fields(Path(f"/proc/{pid}/stat").read_text())
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_helper_leaves_most_of_the_cpu_quota(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that QEMU's main loop still gets CPU time while a helper populates."""
    with cgroups("cpu", depth=2) as ((outer, inner), unified):
        vm = start_vm(start_qemu, tmp_path, "-m", "256M", "-smp", "4", prefix=in_group(inner))
        files = {"cpu.max": "20000 100000"} if unified else {"cpu.cfs_quota_us": "20000"}
        for name, text in files.items():
            (outer / name).write_text(text)
        dry = vm.prefault("--populate-only", "--dry-run")
        assert [warning["code"] for warning in dry.report["warnings"]] == ["cpu-quota"]
        before, most = cpu_seconds(vm.pid), 0
        tool = start_tool(vm.qemu, "--populate-only")
        while tool.running():
            most = max(most, len(helper_threads(vm.pid)))
            time.sleep(0.005)
        result = tool.finish()
        used = cpu_seconds(vm.pid) - before
        vm.qemu.kill()
    assert result.status == 0, result.stderr
    assert [warning["code"] for warning in result.report["warnings"]] == ["cpu-quota"]
    assert most == 1
    # Without rests, this is 0.2.
    assert used / result.report["seconds"]["populate"] < 0.12
