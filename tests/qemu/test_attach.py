# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that helpers in a real QEMU populate memory and leave QEMU unchanged.

The tests use --populate-only, which starts the same helpers on any host. The tests in tests/nested
cover the ioctl and the guest's own memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qemu_prefault import Options, connect, prefault_async
from qemu_prefault_lab.wait import wait_for
from support.process import (
    anonymous_bytes,
    leftovers,
    open_files,
    other_threads,
    resident_bytes,
    tracers,
    wait_clean,
)
from support.qemu import MIB, QemuVm, StartQemu, run_tool, start_tool, start_vm
from support.tool import Tool

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
KILLS = int(os.environ.get("QEMU_PREFAULT_KILLS", "100"))
NOBODY = 65534

StartVm = Callable[..., QemuVm]


@pytest.fixture
def vm_of(start_qemu: StartQemu, tmp_path: Path) -> StartVm:
    def start(*arguments: str, accel: str = "tcg", paused: bool = True) -> QemuVm:
        return start_vm(start_qemu, tmp_path, *arguments, accel=accel, paused=paused)

    return start


# --- complete runs ---

SHAPES = {
    "stopped": (("-m", "128M"), True),
    "running": (("-m", "128M"), False),
    "two vCPUs": (("-m", "128M", "-smp", "2"), True),
    "two vCPUs, running": (("-m", "128M", "-smp", "2"), False),
    "q35": (("-M", "q35", "-m", "128M"), True),
    "microvm": (("-M", "microvm", "-m", "128M"), True),
    "libvirt's sandbox": (("-m", "128M", "-smp", "2", "-sandbox", SANDBOX), True),
    "libvirt's sandbox, running": (("-m", "128M", "-sandbox", SANDBOX), False),
    "locked memory": (("-m", "128M", "-overcommit", "mem-lock=off", "-mem-prealloc"), True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_populates_memory_and_leaves_nothing_behind(vm_of: StartVm, accel: str, shape: str) -> None:
    arguments, paused = SHAPES[shape]
    vm = vm_of(*arguments, accel=accel, paused=paused)
    before = vm.qmp.status()
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr
    assert anonymous_bytes(vm.pid) >= 128 * MIB
    assert result.report["bytes"]["requested"] >= 127 * MIB
    assert result.report["bytes"]["remaining"] == 0
    assert leftovers(vm.pid) == []
    assert tracers(vm.pid) == set()
    assert vm.qmp.status() == before
    if paused:
        vm.qmp.execute("cont")
    assert vm.qmp.status() == "running"


def test_second_populate_is_noop(vm_of: StartVm) -> None:
    vm = vm_of("-m", "128M")
    assert vm.prefault("--populate-only").report["bytes"]["populated"] >= 120 * MIB
    assert vm.prefault("--populate-only").report["bytes"]["populated"] == 0


def test_populates_only_the_given_range(vm_of: StartVm) -> None:
    vm = vm_of("-m", "256M", "-smp", "2")
    ram = next(s for s in vm.prefault("--dry-run", "--populate-only").report["sections"])
    before = resident_bytes(vm.pid, ram["hva"])
    result = vm.prefault("--populate-only", "--range", "64M+32M", "--range", "128M+5000")
    assert result.status == 0
    assert result.report["bytes"]["requested"] == 32 * MIB + 8192
    # Transparent huge pages may populate the rest of a 2 MiB page.
    assert 32 * MIB <= resident_bytes(vm.pid, ram["hva"]) - before <= 36 * MIB


def test_dry_run_changes_nothing(vm_of: StartVm) -> None:
    vm = vm_of("-m", "256M")
    before = anonymous_bytes(vm.pid)
    result = vm.prefault("--populate-only", "--dry-run")
    assert result.status == 0
    assert result.report["bytes"]["populated"] >= 200 * MIB
    assert anonymous_bytes(vm.pid) - before < 2 * MIB
    assert vm.qmp.events == []


def test_cont_resumes_the_guest(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M")
    assert vm.prefault("--populate-only", "--cont").status == 0
    assert vm.qmp.status() == "running"


@pytest.mark.parametrize("vcpus", ["1", "0,2", "0-2"])
def test_uses_only_the_given_vcpus(vm_of: StartVm, vcpus: str) -> None:
    vm = vm_of("-m", "64M", "-smp", "3")
    assert vm.prefault("--populate-only", "--vcpus", vcpus).status == 0


def test_absent_vcpu_is_a_usage_error(vm_of: StartVm) -> None:
    result = vm_of("-m", "64M", "-smp", "2").prefault("--populate-only", "--vcpus", "7")
    assert result.status == 2
    assert result.error["cause"] == "the guest has no vCPU 7"
    assert result.error["remedy"] == "its vCPUs are: 0, 1"


@pytest.mark.parametrize("paused", [True, False], ids=["stopped", "running"])
def test_thirty_runs(vm_of: StartVm, accel: str, paused: bool) -> None:
    vm = vm_of("-m", "64M", "-smp", "2", accel=accel, paused=paused)

    async def once() -> None:
        async with connect(vm.qemu.qmp) as guest:
            report = await prefault_async(guest, Options(populate_only=True))
        assert report.exit_status == 0
        assert leftovers(vm.pid) == []

    timers = Path(f"/proc/{vm.pid}/timers")
    before = timers.read_text() if timers.exists() else ""
    for _ in range(30):
        asyncio.run(once())
        assert vm.qmp.status() == ("prelaunch" if paused else "running")
    assert (timers.read_text() if timers.exists() else "") == before


# --- interrupted runs ---


def spare_memory_of(vm: QemuVm, size: int) -> int:
    """Return a file descriptor for QEMU's memfd of this size in bytes."""
    for link in Path(f"/proc/{vm.pid}/fd").iterdir():
        if "memfd:memory-backend" in os.readlink(link):
            fd = os.open(link, os.O_RDWR)
            if os.fstat(fd).st_size == size:
                return fd
            os.close(fd)
    raise AssertionError("the spare memory was not found")


def punch(fd: int, size: int) -> None:
    """Free all memory of a memfd."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch_hole = 1, 2
    if libc.fallocate(fd, keep_size | punch_hole, ctypes.c_long(0), ctypes.c_long(size)):
        raise OSError(ctypes.get_errno(), "fallocate")


def has_started_helpers(tool: Tool, pid: int) -> bool:
    """Return whether helpers exist or the run has already ended."""
    return bool(leftovers(pid)) or not tool.running()


def test_kill_at_random_moments_leaves_guests_running(vm_of: StartVm, accel: str) -> None:
    """Kill runs on two guests alternately.

    While a run on one guest is in progress, the helpers in the other guest's QEMU exit. The test
    kills half of the runs after a random delay, and the other half while helpers exist.
    """
    spare, several = 16 * MIB, 2
    arguments = ["-M", "pc", "-m", "16M,slots=1,maxmem=1G", "-smp", "2"]
    arguments += ["-object", f"memory-backend-memfd,id=spare,size={spare},share=on"]
    arguments += ["-device", "pc-dimm,memdev=spare"]
    guests = [vm_of(*arguments, accel=accel, paused=False) for _ in range(several)]
    memories = [spare_memory_of(vm, spare) for vm in guests]
    run = ("--populate-only", "--chunk", "4096")

    def timed() -> float:
        punch(memories[0], spare)
        started = time.monotonic()
        result = run_tool(guests[0].qemu, *run)
        assert result.status == 0 and result.report["bytes"]["populated"] >= spare
        return time.monotonic() - started

    duration = min(timed() for _ in range(3))
    rng = random.Random(20)
    killed = 0
    for number in range(KILLS // 2):
        vm, memory = guests[number % several], memories[number % several]
        wait_clean(vm.pid)  # from the previous kill
        punch(memory, spare)
        tool = start_tool(vm.qemu, *run)
        if number % 2:
            wait_for(partial(has_started_helpers, tool, vm.pid), "the helpers run")
            delay = rng.uniform(0, 0.05)
        else:
            delay = rng.uniform(0, duration)
        if tool.running(delay):
            killed += 1
            tool.send_signal(signal.SIGKILL)
            assert not tool.running(10)
        else:
            result = tool.finish()
            assert result.status == 0, result.stderr
        assert vm.qmp.status() == "running", f"kill {number}"
        assert tracers(vm.pid) == set()
    for vm, memory in zip(guests, memories, strict=True):
        wait_clean(vm.pid)
        punch(memory, spare)
        result = vm.prefault("--populate-only")
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] >= spare
        assert leftovers(vm.pid) == []
        os.close(memory)
    assert killed >= KILLS // 4, "most runs ended before they were killed"


def test_run_after_a_kill_waits_for_old_helpers(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", paused=False)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    tool.send_signal(signal.SIGKILL)
    assert not tool.running(10)
    assert vm.prefault("--populate-only").status == 0
    assert leftovers(vm.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_removes_helpers(vm_of: StartVm, number: int) -> None:
    vm = vm_of("-m", "2G", paused=False)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    tool.send_signal(number)
    result = tool.finish()
    assert result.status == 1
    assert result.error["code"] == "interrupted"
    assert leftovers(vm.pid) == []
    assert vm.qmp.status() == "running"


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTTOU])
def test_terminal_does_not_stop_the_tool(vm_of: StartVm, number: int) -> None:
    """Check that Ctrl-Z does not stop a run, which would leave a thread of QEMU stopped."""
    vm = vm_of("-m", "512M", paused=False)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    tool.send_signal(number)
    assert tool.finish(60).status == 0
    assert leftovers(vm.pid) == []


def test_qemu_exit_during_a_run_is_reported(vm_of: StartVm) -> None:
    vm = vm_of("-m", "2G", paused=False)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    vm.qemu.kill()
    result = tool.finish(timeout=10)
    assert result.status == 1
    assert result.error["code"] in ("qemu-gone", "monitor-closed")


# --- refused runs ---


@pytest.fixture
def tracer_of() -> Iterator[Callable[[int], int]]:
    """Return a function that starts a thread's tracer and returns the tracer's pid."""
    program = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0  # PTRACE_SEIZE\n"
        "print('seized', flush=True); sys.stdin.read()"
    )
    tracing: list[subprocess.Popen[str]] = []

    def trace(tid: int) -> int:
        command = [sys.executable, "-c", program, str(tid)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        tracing.append(process)
        assert process.stdout is not None and process.stdout.readline() == "seized\n"
        return process.pid

    yield trace
    for process in tracing:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("traced", ["the vCPU", "the main thread", "other threads"])
def test_other_tracer_is_named(
    vm_of: StartVm, tracer_of: Callable[[int], int], traced: str
) -> None:
    vm = vm_of("-m", "64M", paused=False)
    threads = [vm.pid]
    if traced == "the vCPU":
        threads = [vm.vcpu]
    elif traced == "other threads":
        threads = other_threads(vm.pid, vm.vcpu)
    tracers = [tracer_of(tid) for tid in threads]
    results = [vm.prefault("--populate-only", *more) for more in (["--dry-run"], [])]
    probed = {each["check"]: each for each in vm.command("probe").report["findings"]}
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []
    if traced != "other threads":
        assert [result.status for result in results] == [0, 0]
        assert probed["attach"]["verdict"] == probed["populate"]["verdict"] == "ok"
        return
    assert probed["attach"]["verdict"] == probed["populate"]["verdict"] == "no"
    for result in results:
        assert result.status == 4
        assert result.error["code"] == "ptrace-denied"
        assert any(f"traced by process {pid} (python" in result.error["cause"] for pid in tracers)
        assert any(f"kill {pid}" in result.error["remedy"] for pid in tracers)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["run", "probe", "map"])
def test_missing_right_is_reported(vm_of: StartVm, command: str) -> None:
    vm = vm_of("-m", "64M", paused=False)
    socket = Path(vm.qemu.qmp)
    socket.chmod(0o666)
    for directory in list(socket.parents)[:-1]:
        directory.chmod(directory.stat().st_mode | 0o011)
    arguments = ["--populate-only"] if command == "run" else [command]
    result = Tool([*arguments, "--json", "--qmp", str(socket)], uid=NOBODY).finish()
    assert result.status == 4, result.stderr
    if command == "probe":
        findings = {f["check"]: f for f in result.report["findings"]}
        assert findings["attach"]["verdict"] == "no"
        assert "sudo" in findings["attach"]["remedy"]
    else:
        assert result.error["code"] == "ptrace-denied"
        assert "uid 0" in result.error["cause"] and f"uid {NOBODY}" in result.error["cause"]
        assert "sudo" in result.error["remedy"]
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []


def test_stopped_qemu_fails_fast(vm_of: StartVm) -> None:
    """Check that the tool fails within 10 s if QEMU was stopped by SIGSTOP."""
    vm = vm_of("-m", "64M", paused=False)
    vm.qemu.pause()
    try:
        started = time.monotonic()
        result = vm.prefault("--populate-only")
        assert time.monotonic() - started < 10
    finally:
        vm.qemu.resume()
    assert result.status == 1
    assert result.error["code"] == "monitor-silent"
    assert "stopped" in result.error["cause"] + result.error["remedy"]
    assert vm.qmp.status() == "running"


def test_qemu_stopped_during_a_run(vm_of: StartVm) -> None:
    vm = vm_of("-m", "512M", paused=False)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    vm.qemu.pause()
    assert tool.running(1)  # the tool waits, because QEMU may continue
    vm.qemu.resume()
    assert tool.finish().status == 0
    assert leftovers(vm.pid) == []
    assert vm.qmp.status() == "running"


def test_runs_that_start_together_take_turns(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that a run starts no helpers while another run starts its own."""
    other = tmp_path / "other"
    vm = start_vm(
        start_qemu, tmp_path, "-m", "64M", "-qmp", f"unix:{other},server=on,wait=off", paused=False
    )
    for _ in range(20):
        tools = [
            Tool(["--qmp", path, "--json", "--populate-only"]) for path in (vm.qemu.qmp, str(other))
        ]
        for tool in tools:
            result = tool.finish()
            assert result.status == 0, result
    assert leftovers(vm.pid) == []


def test_short_trace_delays_the_run(vm_of: StartVm, tracer_of: Callable[[int], int]) -> None:
    """Check that a run waits for a brief tracer, such as another probe."""
    vm = vm_of("-m", "64M", paused=False)
    tracers = [tracer_of(tid) for tid in other_threads(vm.pid, vm.vcpu)]
    tool = start_tool(vm.qemu, "--populate-only")
    memory = f"/proc/{vm.pid}/mem"
    wait_for(lambda: memory in open_files(tool.pid), "the tool attaches to QEMU")
    assert tool.running(0.5)
    for tracer in tracers:
        os.kill(tracer, signal.SIGKILL)
    assert tool.finish().status == 0
    assert leftovers(vm.pid) == []


def test_concurrent_runs_on_two_monitors(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that a second run waits for the first run or is refused."""
    other = tmp_path / "other"
    vm = start_vm(
        start_qemu, tmp_path, "-m", "1G", "-qmp", f"unix:{other},server=on,wait=off", paused=False
    )
    first = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    wait_for(lambda: bool(leftovers(vm.pid)), "the helpers run")
    second = Tool(["--qmp", str(other), "--json", "--populate-only"]).finish()
    assert first.finish().status == 0
    if second.status == 5:
        assert second.error["code"] == "busy-agent"
    else:
        assert second.status == 0
    assert leftovers(vm.pid) == []
