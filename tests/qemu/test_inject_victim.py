# SPDX-License-Identifier: GPL-2.0-or-later
"""Test injection into a program that checks the state of all its threads."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from qemu_prefault.agents.base import Limits, VcpuThread
from qemu_prefault.agents.helper_calls import check_filters
from qemu_prefault.agents.injector import Injector
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.agents.qemu_process import open_memory
from qemu_prefault.errors import AgentError, FailedError, UnsupportedError
from qemu_prefault.host.procfs import FUTEX, Process
from qemu_prefault_lab.wait import wait_for
from support import under_filter
from support.process import leftovers, tracers, wait_clean

SOURCE = Path(__file__).with_name("victim.c")
ROUNDS = int(os.environ.get("QEMU_PREFAULT_INJECTIONS", "150"))
PTRACE_POKEUSER, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 6, 17, 0x4206, 0x4207
WALL = 0x40000000
R14 = 8  # byte offset in struct user_regs_struct


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    path = tmp_path_factory.mktemp("victim") / "victim"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["cc", *flags, SOURCE, "-o", path], check=True)
    return path


@dataclass
class Victim:
    process: subprocess.Popen[str]
    threads: list[int]

    @property
    def pid(self) -> int:
        return self.process.pid

    def agent(self) -> PtraceAgent:
        threads = [VcpuThread(tid, -1, None) for tid in self.threads]
        return PtraceAgent(Process.find(self.pid), threads, Limits())

    def verdict(self) -> str:
        """Make the program exit and return the line that reports changes."""
        return self.process.communicate(timeout=30)[0].strip()


@contextmanager
def start_victim(*command: str | Path) -> Iterator[Victim]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    try:
        yield Victim(process, [int(tid) for tid in process.stdout.readline().split()])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def victim(program: Path) -> Iterator[Victim]:
    with start_victim(program) as started:
        yield started


def test_injection_is_invisible_to_threads(victim: Victim) -> None:
    """Check that repeated injections do not change the state of any thread.

    The state is the registers, flags, red zone, errno, signal mask, alternate stack and pending
    signals. The threads compute, sleep, wait for futexes, read from a pipe, and receive signals.
    """
    started = time.monotonic()

    async def rounds() -> int:
        done = 0
        while done < ROUNDS and time.monotonic() - started < 60:
            agent = victim.agent()
            await agent.start()
            await agent.close()
            assert victim.process.poll() is None, victim.verdict()
            done += 1
        return done

    assert asyncio.run(rounds()) == ROUNDS
    assert leftovers(victim.pid) == []
    assert tracers(victim.pid) == set()
    verdict = victim.verdict()
    assert verdict.startswith("unchanged "), verdict
    assert victim.process.returncode == 0
    assert all(int(count) > ROUNDS / 5 for count in verdict.split()[1:6]), verdict


def test_reading_filters_does_not_make_a_killing_call(program: Path) -> None:
    """Check that stopped threads do not make restart_syscall(2), for which a filter kills them."""
    command = (sys.executable, under_filter.__file__, "kill", "219", "--", program)
    with start_victim(*command) as victim:
        for tid in victim.threads * ROUNDS:
            with pytest.raises(UnsupportedError, match="does not allow restart_syscall"):
                check_filters(Process.find(victim.pid), [tid])
        assert victim.verdict().startswith("unchanged ")


def test_killed_injector_is_invisible_to_threads(victim: Victim) -> None:
    """Kill the injector at various instants, and check that no thread has changed.

    An instant may be within an injected system call.
    """
    for number in range(ROUNDS // 3):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    asyncio.run(victim.agent().start())
            finally:
                os._exit(1)
        time.sleep(number * 0.0005)  # kill the injector at a different instant each time
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert victim.process.poll() is None, victim.verdict()
        wait_clean(victim.pid)
    verdict = victim.verdict()
    assert verdict.startswith("unchanged "), verdict
    assert victim.process.returncode == 0


#: A program with a thread that computes, and with two threads that wait in futex(2) until the
#: program reads a line for each thread.
IDLE_THREADS = """
import sys, threading
sys.setswitchinterval(0.001)
def compute():
    while True:
        pass
waiting = [threading.Event(), threading.Event()]
threads = [threading.Thread(target=event.wait, daemon=True) for event in waiting]
threads.append(threading.Thread(target=compute, daemon=True))
for thread in threads:
    thread.start()
print(*[thread.native_id for thread in threads], flush=True)
for event in waiting:
    sys.stdin.readline()
    event.set()
sys.stdin.readline()
"""


@pytest.mark.parametrize("exits", [0, 1, 2])
def test_idle_thread_starts_helper(exits: int) -> None:
    """Check that an idle thread starts the helper, even if the chosen thread exits."""
    pipe = subprocess.PIPE
    program = [sys.executable, "-c", IDLE_THREADS]
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True) as target:
        assert target.stdin is not None and target.stdout is not None
        *idle, vcpu = (int(word) for word in target.stdout.readline().split())
        process = Process.find(target.pid)
        wait_for(lambda: all(process.waits_in(tid) == FUTEX for tid in idle), "the threads wait")
        memory = open_memory(process)
        injector = Injector(process, memory, [VcpuThread(vcpu, -1, None)], Limits())
        for tid in idle[:exits]:
            target.stdin.write("\n")
            target.stdin.flush()
            wait_for(partial(gone, process, tid), "the thread exits")
        before = {tid: switches(process, tid) for tid in [*idle[exits:], vcpu]}
        helper = injector.start_helper(0)
        helper.write_word("release", 1)
        wait_clean(target.pid)
        starter = [*idle, vcpu][exits]
        stopped = {tid for tid, count in before.items() if switches(process, tid) != count}
        assert stopped - {vcpu} == {starter} - {vcpu}
        os.close(memory)
        target.kill()


def gone(process: Process, tid: int) -> bool:
    return not process.has_thread(tid)


def switches(process: Process, tid: int) -> str:
    """Return how often a thread has waited."""
    status = Path(f"/proc/{process.pid}/task/{tid}/status").read_text()
    return status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]


def test_victim_detects_a_change(victim: Victim) -> None:
    """Check that the victim reports one changed register of one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    tid = victim.threads[0]
    for _ in range(20):
        assert libc.ptrace(PTRACE_SEIZE, tid, None, None) == 0
        assert libc.ptrace(PTRACE_INTERRUPT, tid, None, None) == 0
        os.waitpid(tid, WALL)
        assert libc.ptrace(PTRACE_POKEUSER, tid, R14, 0xBAD) == 0
        libc.ptrace(PTRACE_DETACH, tid, None, None)
        try:
            victim.process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    assert victim.process.returncode != 0
    assert "0xbad" in victim.verdict() or victim.process.returncode < 0


def test_helpers_end_if_a_later_thread_is_gone(victim: Victim) -> None:
    victim.threads.append(4_000_000)
    with pytest.raises(FailedError, match="has exited"):
        asyncio.run(victim.agent().start())
    assert leftovers(victim.pid) == []
    assert victim.verdict().startswith("unchanged ")


def test_stopped_thread_is_skipped_and_stays_stopped(victim: Victim) -> None:
    """Check that a thread stopped by SIGSTOP causes an error and stays stopped."""
    os.kill(victim.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(AgentError, match="stopping the thread failed") as caught:
        asyncio.run(victim.agent().start())
    assert caught.value.remedy
    assert "T (stopped)" in Path(f"/proc/{victim.pid}/status").read_text()
    os.kill(victim.pid, signal.SIGCONT)
    assert leftovers(victim.pid) == []
    assert victim.verdict().startswith("unchanged ")


def test_run_waits_for_helpers_of_a_hung_run(victim: Victim) -> None:
    """Check that new helpers start only after those of a hung run have exited."""
    read_end, write_end = os.pipe()
    hung = os.fork()
    if hung == 0:
        try:
            asyncio.run(victim.agent().start())
            os.write(write_end, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write_end)
    assert os.read(read_end, 1) == b"x", "the first run failed"
    os.close(read_end)
    os.kill(hung, signal.SIGSTOP)
    assert leftovers(victim.pid)

    async def run() -> None:
        agent = victim.agent()
        await agent.start()
        await agent.close()

    try:
        asyncio.run(run())
    finally:
        os.kill(hung, signal.SIGKILL)
        os.waitpid(hung, 0)
    assert leftovers(victim.pid) == []
    assert victim.verdict().startswith("unchanged ")
