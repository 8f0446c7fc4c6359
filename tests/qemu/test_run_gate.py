# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a vCPU stays out of KVM_RUN until its helper's batch has ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault._native import lib
from qemu_prefault.agents import run_gate
from qemu_prefault.agents.base import Kind, Limits, Range, VcpuThread, resumed_error
from qemu_prefault.agents.control_page import Helper, offset_of
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.agents.run_gate import RunGate
from qemu_prefault.errors import AgentError, Code, FailedError
from qemu_prefault.host.fds import kvm_fds
from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for
from support.process import leftovers, tracers, wait_clean
from support.qemu import MIB, QemuVm, StartQemu, start_vm

#: A program that simulates a vCPU thread. It reads ioctl numbers from stdin and issues these
#: ioctls, which fail with ENOTTY.
THREAD = """
import ctypes, mmap, signal, sys
page = mmap.mmap(-1, 1 << 20)
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
libc = ctypes.CDLL(None)
print(ctypes.addressof(ctypes.c_char.from_buffer(page)), flush=True)
for line in sys.stdin:
    libc.ioctl(0, int(line, 0), 0)
    print(len(seen), flush=True)
"""
KVM_RUN, KVM_GET_REGS = 0xAE80, 0x8090AE81


@dataclass
class FakeVcpu:
    """A process that simulates QEMU, and a control page that the test writes."""

    process: subprocess.Popen[str]
    memory: int
    helper: Helper

    @property
    def pid(self) -> int:
        return self.process.pid

    def read(self, field: str) -> int:
        return int(getattr(self.helper.read_header(), field))

    def ioctl(self, request: int) -> None:
        assert self.process.stdin is not None
        print(request, file=self.process.stdin, flush=True)

    def signals_seen(self) -> int:
        """Wait for the end of the ioctl and return the number of handled signals."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def gate(self) -> RunGate:
        return RunGate(Process.find(self.pid), self.memory, [self.pid], [self.helper])


@pytest.fixture
def vcpu() -> Iterator[FakeVcpu]:
    with subprocess.Popen(
        [sys.executable, "-c", THREAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = int(process.stdout.readline())
        memory = os.open(f"/proc/{process.pid}/mem", os.O_RDWR)
        magic = lib.PREFAULT_CONTROL_MAGIC.to_bytes(8, "little")
        os.pwrite(memory, magic, address + offset_of("magic"))
        yield FakeVcpu(process, memory, Helper(memory, address, 0))
        os.close(memory)
        process.kill()


@contextlib.asynccontextmanager
async def held(vcpu: FakeVcpu) -> AsyncIterator[RunGate]:
    gate = vcpu.gate()
    try:
        await gate.hold()
        yield gate
    finally:
        await gate.close()


def test_vcpu_waits_for_the_helper(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        vcpu.helper.write_word("batch", 1)
        async with held(vcpu) as gate:
            vcpu.ioctl(KVM_RUN)
            wait_for(lambda: vcpu.read("vcpu_runs") == 1, "the gate ends the helper's batch")
            assert vcpu.state() == "t"
            vcpu.helper.write_word("batch_done", 1)
            vcpu.signals_seen()
            assert not tracers(vcpu.pid)
            assert gate.holds()  # the batch ended normally, so the gate continues
            await gate.release()

    asyncio.run(check())


def test_idle_helper_delays_nothing(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        async with held(vcpu):
            vcpu.ioctl(KVM_RUN)
            vcpu.signals_seen()
            assert vcpu.read("vcpu_runs") == 1

    asyncio.run(check())


def test_other_calls_and_signals_pass(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        vcpu.helper.write_word("batch", 1)
        async with held(vcpu) as gate:
            for count in (1, 2, 3):
                os.kill(vcpu.pid, signal.SIGUSR1)
                wait_for(lambda: not pending(vcpu.pid), "the signal is delivered")
                vcpu.ioctl(KVM_GET_REGS)
                assert vcpu.signals_seen() == count
            assert vcpu.read("vcpu_runs") == 0
            vcpu.helper.write_word("batch_done", 1)
            await gate.release()
            assert not tracers(vcpu.pid)
            vcpu.ioctl(KVM_RUN)
            vcpu.signals_seen()
            assert vcpu.read("vcpu_runs") == 0  # the gate no longer detects KVM_RUN

    asyncio.run(check())


def pending(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return any(
        int(line.split()[1], 16)
        for line in status.splitlines()
        if line.startswith(("SigPnd:", "ShdPnd:"))
    )


def test_vcpus_can_be_held_again(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        async with held(vcpu) as gate:
            for _ in range(20):
                await gate.release()
                assert not gate.holds()
                vcpu.ioctl(KVM_RUN)
                vcpu.signals_seen()
                await gate.hold()
                assert gate.holds()
        assert vcpu.read("vcpu_runs") == 0

    asyncio.run(check())


def test_stopped_process_stays_stopped(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        async with held(vcpu) as gate:
            os.kill(vcpu.pid, signal.SIGSTOP)
            wait_for(lambda: vcpu.state() == "t", "the process is stopped")
            vcpu.ioctl(KVM_GET_REGS)
            await gate.release()
            wait_for(lambda: vcpu.state() == "T", "the process is stopped without the gate")
            os.kill(vcpu.pid, signal.SIGCONT)
            vcpu.signals_seen()

    asyncio.run(check())


def test_killed_gate_frees_the_vcpu(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        async with held(vcpu) as gate:
            os.kill(int(tracers(vcpu.pid).pop()), signal.SIGKILL)
            wait_for(lambda: not gate.holds(), "the tool detects the gate's exit")
            vcpu.ioctl(KVM_RUN)
            vcpu.signals_seen()
            with pytest.raises(AgentError):
                await gate.hold()

    asyncio.run(check())


@pytest.mark.parametrize("entering", [False, True], ids=["outside KVM_RUN", "before KVM_RUN"])
def test_gate_is_killed_if_a_helper_stays_busy(vcpu: FakeVcpu, entering: bool) -> None:
    async def check() -> None:
        vcpu.helper.write_word("batch", 1)
        gate = vcpu.gate()
        await gate.hold()
        if entering:
            vcpu.ioctl(KVM_RUN)
            wait_for(lambda: vcpu.read("vcpu_runs") == 1, "the gate ends the helper's batch")
        started = time.monotonic()
        await gate.close(seconds=0.3)
        assert time.monotonic() - started < 3

    asyncio.run(check())
    assert not tracers(vcpu.pid)
    assert vcpu.read("vcpu_runs") == 1
    if not entering:
        vcpu.ioctl(KVM_RUN)
    vcpu.signals_seen()


def test_stopped_gate_does_not_block_the_tool(
    vcpu: FakeVcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gate, "ANSWER_SECONDS", 0.3)

    async def check() -> None:
        gate = vcpu.gate()
        os.kill(gate._child, signal.SIGSTOP)
        with pytest.raises(AgentError, match="did not reply"):
            await gate.hold()
        await gate.close(seconds=0.3)

    started = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - started < 3


def test_vcpu_runs_if_the_gate_does_not_release_it(
    vcpu: FakeVcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with held(vcpu) as gate:
            os.kill(gate._child, signal.SIGSTOP)
            monkeypatch.setattr(run_gate, "ANSWER_SECONDS", 0.3)
            await gate.release()
            assert not tracers(vcpu.pid)
            vcpu.ioctl(KVM_RUN)
            vcpu.signals_seen()

    asyncio.run(check())


@pytest.fixture(scope="session")
def slow_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    path = tmp_path_factory.mktemp("slow") / "slow_threads"
    source = Path(__file__).with_name("slow_threads.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", path], check=True)
    return path


def test_slow_threads_share_one_limit(slow_threads: Path) -> None:
    """Check that hold() does not wait 2 s for each of many threads."""

    async def check(pid: int, memory: int) -> None:
        tids = [tid for tid in Process.find(pid).threads() if tid != pid]
        assert len(tids) == 6
        gate = RunGate(Process.find(pid), memory, tids, [Helper(memory, 0, 0) for _ in tids])
        started = time.monotonic()
        with pytest.raises(AgentError, match="does not stop: Connection timed out"):
            await gate.hold()
        assert 3 <= time.monotonic() - started < 7
        await gate.close(seconds=3)

    with subprocess.Popen([slow_threads], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        memory = os.open(f"/proc/{process.pid}/mem", os.O_RDWR)
        asyncio.run(check(process.pid, memory))
        os.close(memory)
        assert not tracers(process.pid)
        assert process.wait(20) == 0  # no thread stays stopped


def test_slow_threads_limit_the_start(slow_threads: Path) -> None:
    """Check that a run does not wait 2 s for each of many threads that start helpers."""

    async def check(process: Process) -> None:
        vcpus = [tid for tid in process.threads() if tid != process.pid] + [process.pid]
        agent = PtraceAgent(process, [VcpuThread(tid, -1, None) for tid in vcpus])
        with pytest.raises(AgentError, match="did not start all helper threads within 5 s"):
            await agent.start()

    with subprocess.Popen([slow_threads], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        asyncio.run(check(Process.find(process.pid)))
        wait_clean(process.pid)
        assert process.wait(20) == 0


TOOL = """
import asyncio, os, sys
from qemu_prefault.agents.control_page import Helper
from qemu_prefault.agents.run_gate import RunGate
from qemu_prefault.host.procfs import Process

async def main():
    pid, address = map(int, sys.argv[1:])
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    gate = RunGate(Process.find(pid), memory, [pid], [Helper(memory, address, 0)])
    await gate.hold()
    print("held", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_stopped_tool_does_not_freeze_the_vcpu(
    vcpu: FakeVcpu, number: signal.Signals
) -> None:
    vcpu.helper.write_word("batch", 1)
    arguments = [sys.executable, "-c", TOOL, str(vcpu.pid), str(vcpu.helper.control)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "held\n"
        tool.send_signal(number)
        vcpu.ioctl(KVM_RUN)
        wait_for(lambda: vcpu.read("vcpu_runs") == 1, "the gate ends the helper's batch")
        # The gate may see the end of the tool before the thread enters KVM_RUN.
        wait_for(lambda: vcpu.state() == "t", "the thread is stopped before KVM_RUN")
        vcpu.helper.write_word("batch_done", 1)
        vcpu.signals_seen()
        tool.kill()


def test_gate_ends_beside_a_fork_of_the_tool(vcpu: FakeVcpu) -> None:
    """Check that the gate exits although a fork of the tool has its socket open.

    The resume guard is such a process, because it inherits the tool's descriptors.
    """

    async def check() -> None:
        async with held(vcpu):
            fork = os.fork()
            if not fork:
                signal.pause()
        assert not tracers(vcpu.pid)
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)

    asyncio.run(check())


def test_gate_inherits_nothing_of_the_tool(vcpu: FakeVcpu) -> None:
    async def check() -> None:
        async with held(vcpu):
            gate = tracers(vcpu.pid).pop()
            descriptors = sorted(Path(f"/proc/{gate}/fd").iterdir())
            assert [path.name for path in descriptors] == ["0", "1", "2", "3"]
            assert os.readlink(descriptors[0]).startswith("socket:")
            assert os.readlink(descriptors[1]) == f"/proc/{vcpu.pid}/mem"
            assert os.readlink(descriptors[2]) == f"/proc/{vcpu.pid}"
            assert os.getsid(int(gate)) == int(gate)  # Ctrl-C and Ctrl-Z do not reach it

    asyncio.run(check())


# --- with QEMU ---


def start_guest(start_qemu: StartQemu, tmp_path: Path, *, paused: bool = True) -> QemuVm:
    arguments = ("-m", "1G", "-smp", "2")
    return start_vm(start_qemu, tmp_path, *arguments, accel="kvm", paused=paused)


def is_in_guest(vm: QemuVm) -> bool:
    """Return whether the first vCPU's thread is in KVM_RUN or runs on a CPU."""
    call = Process.find(vm.pid).thread_syscall(vm.vcpu) or ""
    return call.startswith("running") or hex(KVM_RUN) in call


def make_agent(vm: QemuVm) -> PtraceAgent:
    process = Process.find(vm.pid)
    fds = sorted(kvm_fds(process).vcpus.items())
    tids = [int(cpu["thread-id"]) for cpu in vm.qmp.execute("query-cpus-fast")]
    threads = [VcpuThread(tid, fd, vcpu_id) for tid, (vcpu_id, fd) in zip(tids, fds, strict=True)]
    return PtraceAgent(process, threads, Limits(chunk_bytes=mmap.PAGESIZE))


def guest_ram(pid: int) -> int:
    """Return the host-virtual address of the guest's RAM in QEMU."""
    return next(m.start for m in Process.find(pid).maps() if m.size == 1024 * MIB)


def test_resumed_guest_ends_the_batch(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_guest(start_qemu, tmp_path)

    async def check() -> None:
        agent = make_agent(vm)
        await agent.start()
        assert await agent.hold_vcpus()
        begun = asyncio.Event()
        start = guest_ram(vm.pid)
        batch = asyncio.create_task(
            agent.run(
                {0: [Range(Kind.POPULATE, start, 1024 * MIB)]},
                lambda done: begun.set() if done else None,
            )
        )
        await begun.wait()
        vm.qmp.execute("cont")
        outcome = (await batch).outcomes[0][0]
        assert outcome.error == errno.ECANCELED
        assert 0 < outcome.done < 1024 * MIB
        wait_for(lambda: is_in_guest(vm), "the guest runs")
        await agent.close()

    asyncio.run(check())
    assert not leftovers(vm.pid)
    assert not tracers(vm.pid)


def test_running_guest_is_not_held(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_guest(start_qemu, tmp_path, paused=False)
    wait_for(lambda: is_in_guest(vm), "the guest runs")

    async def check() -> None:
        agent = make_agent(vm)
        await agent.start()
        try:
            # The vCPU may be outside KVM_RUN when it is stopped, and enter KVM_RUN shortly after.
            with pytest.raises(FailedError) as caught:
                await agent.hold_vcpus()
                populate = Range(Kind.POPULATE, guest_ram(vm.pid), 1024 * MIB)
                result = await agent.run({0: [populate]}, lambda done: None)
                assert result.outcomes[0][0].error == errno.ECANCELED
                raise resumed_error()
            assert caught.value.code is Code.RESUMED
        finally:
            await agent.close()

    asyncio.run(check())
    wait_for(lambda: is_in_guest(vm), "the guest is running")
    wait_clean(vm.pid)


def test_monitor_works_while_vcpus_are_held(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that QEMU can execute commands in vCPU threads before the gate's release."""
    vm = start_guest(start_qemu, tmp_path)

    def read_registers() -> str:
        return str(vm.qmp.execute("human-monitor-command", command_line="info registers -a"))

    async def check() -> None:
        agent = make_agent(vm)
        await agent.start()
        await agent.hold_vcpus()
        text = await asyncio.to_thread(read_registers)
        assert "RIP=" in text or "EIP=" in text
        await asyncio.to_thread(vm.qmp.execute, "system_reset")
        await agent.release_vcpus()
        await agent.close()

    asyncio.run(check())


def test_batch_needs_held_vcpus(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_guest(start_qemu, tmp_path)

    async def check() -> None:
        agent = make_agent(vm)
        await agent.start()
        with pytest.raises(AgentError):
            await agent.run({0: [Range(Kind.STAGE2, 0, MIB)]}, lambda done: None)
        await agent.close()

    asyncio.run(check())


def test_killed_qemu_is_not_waited_for(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_guest(start_qemu, tmp_path)

    async def check() -> None:
        agent = make_agent(vm)
        await agent.start()
        await agent.hold_vcpus()
        vm.qemu.kill()
        await agent.release_vcpus()
        await agent.close()

    asyncio.run(check())
