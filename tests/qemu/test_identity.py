# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the attach agent changes no process but the one that was identified."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_prefault.agents import ptrace
from qemu_prefault.agents.base import Kind, Limits, Range, VcpuThread
from qemu_prefault.agents.control_page import Helper, offset_of
from qemu_prefault.agents.injector import Injector
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.agents.qemu_process import open_memory
from qemu_prefault.agents.run_gate import RunGate
from qemu_prefault.errors import AgentError, Code, FailedError, GoneError
from qemu_prefault.host.identify import identify
from qemu_prefault.host.peer import Peer
from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for
from support.process import leftovers, tracers, wait_clean
from support.reuse import start_with_pid

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users or chooses pids")
PIPE = subprocess.PIPE
REUSES = 200
OTHER_USER = 65534

#: A program with one thread beside the main thread. The thread ends when the program reads a line.
#: After another line, the program runs the Python code in its first argument. The program starts as
#: root, because other users cannot execute root's Python, and then becomes the user in its second
#: argument. As after an exec, its memory can then be dumped.
TARGET = """
import ctypes, os, sys, threading
user = int(sys.argv[2])
if user != os.geteuid():
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
reader, writer = os.pipe()
thread = threading.Thread(target=os.read, args=(reader, 1), daemon=True)
thread.start()
print(thread.native_id, flush=True)
sys.stdin.readline()
os.write(writer, b"x")
thread.join()
print("ended", flush=True)
sys.stdin.readline()
exec(sys.argv[1])
print("done", flush=True)
sys.stdin.readline()
"""


class Target:
    """A process that simulates QEMU, and its second thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.tid = int(self.stdout.readline())

    def proceed(self) -> None:
        print(file=self.stdin, flush=True)

    def end_thread(self) -> None:
        self.proceed()
        assert self.stdout.readline() == "ended\n"
        task = Path(f"/proc/{self.process.pid}/task/{self.tid}")
        wait_for(lambda: not task.exists(), "the thread has exited")


@contextlib.contextmanager
def start_target(code: str = "pass", user: int | None = None) -> Iterator[Target]:
    """Start a process that simulates QEMU.

    :param user: Its user. By default, root starts the process as another user.
    """
    if user is None:
        user = os.geteuid() or OTHER_USER
    command = [sys.executable, "-c", TARGET, code, str(user)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield Target(process)
        process.kill()


def state(directory: str) -> str:
    return Path(f"{directory}/stat").read_text().rpartition(")")[2].split()[0]


def is_waiting(pid: int) -> bool:
    return state(f"/proc/{pid}") == "S"


def switches(pid: int) -> list[str]:
    """Return how often a process has waited. A ptrace stop changes this number."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if "ctxt_switches" in line or line.startswith("TracerPid")]


@needs_root
@pytest.mark.parametrize("user", [0, OTHER_USER], ids=["root", "other user"])
def test_reused_thread_id_is_refused(user: int) -> None:
    """Check a QEMU whose thread id another process of root gets."""
    with start_target(user=user) as target:
        process = Process.find(target.process.pid)
        memory = open_memory(process)
        vcpu = VcpuThread(target.tid, -1, None)
        injector = Injector(process, memory, [vcpu], Limits())
        gate = RunGate(process, memory, [target.tid], [Helper(memory, 0, 0)])
        target.end_thread()
        for _ in range(REUSES):
            foreign = start_with_pid(target.tid)
            wait_for(lambda: is_waiting(target.tid), "the foreign process waits")
            before = switches(foreign.pid)
            with pytest.raises(FailedError, match=f"thread {target.tid} of QEMU") as caught:
                injector.start_helper(0)
            assert caught.value.code == Code.QEMU_GONE
            with pytest.raises(FailedError) as caught:
                asyncio.run(gate.hold())
            assert caught.value.code == Code.QEMU_GONE
            assert switches(foreign.pid) == before
            assert foreign.communicate(b"unharmed")[0] == b"unharmed"
            assert foreign.returncode == 0
        asyncio.run(gate.close())
        os.close(memory)


@needs_root
def test_foreign_thread_of_control_page_is_not_placed() -> None:
    with start_target() as target, subprocess.Popen(["cat"], stdin=PIPE) as foreign:
        process = Process.find(target.process.pid)
        memory = open_memory(process)
        injector = Injector(process, memory, [VcpuThread(target.tid, -1, None)], Limits())
        os.setpriority(os.PRIO_PROCESS, foreign.pid, 7)
        for number in (foreign.pid, 0, 1 << 22, (1 << 32) - 1):
            assert injector.place(0, Helper(memory, 0, 0), number) == []
        assert os.getpriority(os.PRIO_PROCESS, foreign.pid) == 7
        os.close(memory)
        foreign.kill()


CHANGES = {
    "exec": "print('done', flush=True); os.execvp('cat', ['cat'])",
    "user": "os.setresuid(65534, 65534, 65534)",
    "group": "os.setresgid(65534, 65534, 65534)",
}


def check_is_refused(target: Target, has_changed: Callable[[Process], bool]) -> Process:
    """Let the target change, and check that nothing is then injected into it."""
    process = Process.find(target.process.pid)
    target.end_thread()
    vcpu = VcpuThread(process.pid, -1, None)
    memory = open_memory(process)
    injector = Injector(process, memory, [vcpu], Limits())
    gate = RunGate(process, memory, [process.pid], [Helper(memory, 0, 0)])
    target.proceed()
    assert target.stdout.readline() == "done\n"
    wait_for(lambda: has_changed(process) and is_waiting(process.pid), "the process has changed")
    agent = PtraceAgent(process, [vcpu], Limits())
    for attempt in (
        lambda: injector.start_helper(0),
        lambda: asyncio.run(gate.hold()),
        lambda: asyncio.run(agent.start()),
        lambda: open_memory(process),
    ):
        with pytest.raises(GoneError, match="executed another program or changed its user"):
            attempt()
    assert not leftovers(process.pid)
    assert not tracers(process.pid)
    asyncio.run(gate.close())
    os.close(memory)
    return process


def runs_cat(process: Process) -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text() == "cat\n"


@needs_root
@pytest.mark.parametrize("code", CHANGES.values(), ids=CHANGES)
def test_changed_process_is_refused(code: str) -> None:
    with start_target(code, user=0) as target:
        check_is_refused(target, lambda process: "exec" not in code or runs_cat(process))


@pytest.fixture
def set_uid_cat() -> Iterator[Path]:
    """Yield the path of a set-uid program of root that every user can execute."""
    directory = Path(tempfile.mkdtemp(prefix="set-uid-", dir="/var/tmp"))
    directory.chmod(0o755)
    program = Path(shutil.copy(shutil.which("cat") or "", directory))
    program.chmod(0o4755)
    yield program
    shutil.rmtree(directory)


@needs_root
def test_set_uid_program_of_another_user_is_refused(set_uid_cat: Path) -> None:
    """Check that the tool does not help a hostile QEMU to change a program that runs as root."""
    code = f"print('done', flush=True); os.execv({str(set_uid_cat)!r}, ['cat'])"
    with start_target(code, user=OTHER_USER) as target:
        process = check_is_refused(target, runs_cat)
        if process.status().uids != (OTHER_USER, 0, 0, 0):
            pytest.skip("/var/tmp is mounted with nosuid")
        assert target.process.communicate("unharmed")[0] == "unharmed"
        assert target.process.returncode == 0


@pytest.fixture(scope="session")
def sharer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if shutil.which("cc") is None or shutil.which("setarch") is None:
        pytest.skip("no C compiler or no setarch is installed")
    path = tmp_path_factory.mktemp("sharer") / "sharer"
    source = Path(__file__).with_name("sharer.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", path], check=True)
    # Without randomization, the stack of cat has the same addresses as that of the program.
    return ["setarch", "--addr-no-randomize", str(path)]


def test_memory_of_the_old_program_is_refused(sharer: list[str]) -> None:
    """Check that another process cannot keep the identified program's memory valid."""
    with subprocess.Popen(sharer, stdin=PIPE, stdout=PIPE) as target:
        assert target.stdin is not None and target.stdout is not None
        assert target.stdout.readline() == b"ready\n"
        process = Process.find(target.pid)
        memory = open_memory(process)
        stack = next(m for m in process.maps() if m.path == "[stack]")
        injector = Injector(process, memory, [VcpuThread(target.pid, -1, None)], Limits())
        target.stdin.write(b"x")
        target.stdin.flush()
        wait_for(lambda: process.name == "cat" and is_waiting(target.pid), "cat runs")
        found = next(m for m in process.maps() if m.path == "[stack]")
        assert stack.end == found.end and len(os.pread(memory, 8, stack.end - 8)) == 8
        before = os.pread(memory, stack.size, stack.start)
        with pytest.raises(GoneError, match="executed another program"):
            injector.start_helper(0)
        assert os.pread(memory, stack.size, stack.start) == before
        assert target.communicate(b"unharmed")[0] == b"unharmed"
        os.close(memory)


# --- the peer of a socket ---


def socket_of_dead_listener(path: Path) -> tuple[int, socket.socket]:
    """Return the pid of another user's process that called listen(), and a connection.

    The process has exited.
    """
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(path))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            bound.listen()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return pid, client


@needs_root
def test_reused_pid_of_a_listener_is_refused(tmp_path: Path) -> None:
    pid, client = socket_of_dead_listener(tmp_path / "socket")
    peer = Peer.of(client)
    assert peer is not None and peer.pid == pid
    foreign = start_with_pid(pid)
    with pytest.raises(GoneError, match="has exited, and another process may have its pid"):
        identify(pid, None, [pid], peer)
    assert identify(pid, pid, [pid], peer).pid == pid  # the user has named the process
    foreign.communicate()
    client.close()


def test_living_listener_is_identified(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))
        peer = Peer.of(client)
        assert peer is not None and peer.pid == os.getpid()
        peer.check(Process.find(os.getpid()))


# --- helpers that lie ---


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[PtraceAgent]:
    monkeypatch.setattr(ptrace, "NO_PROGRESS_SECONDS", dict.fromkeys(Kind, 0.5))
    with start_target() as target:
        process = Process.find(target.process.pid)
        yield PtraceAgent(process, [VcpuThread(target.tid, -1, None)], Limits(stuck=0.5))


@pytest.mark.parametrize("forged", [False, True], ids=["silent", "counting"])
def test_helper_without_progress_ends_the_run(agent: PtraceAgent, forged: bool) -> None:
    pid = agent.process.pid

    async def count() -> None:
        """Change the counter of chunks, as a QEMU that lies would do."""
        helper = agent._helpers[0]
        at = helper.control + offset_of("chunk_started_ns")
        number = 0
        while True:
            number += 1
            os.pwrite(agent._memory, number.to_bytes(8, "little"), at)
            await asyncio.sleep(0.05)

    async def check() -> None:
        await agent.start()
        stop(agent)  # the helper does not see the batch
        forger = asyncio.create_task(count()) if forged else None
        try:
            async with asyncio.timeout(10):
                with pytest.raises(AgentError, match="made no progress"):
                    await agent.run({0: [Range(Kind.POPULATE, 0x10000, 4096)]}, lambda done: None)
        finally:
            if forger is not None:
                forger.cancel()
            os.kill(pid, signal.SIGCONT)
            await agent.close()

    asyncio.run(check())
    wait_clean(pid)


def stop(agent: PtraceAgent) -> None:
    os.kill(agent.process.pid, signal.SIGSTOP)
    task = agent.process.proc + f"/task/{agent._helpers[0].thread_id}"
    wait_for(lambda: state(task) == "T", "the helper is stopped")


def test_helper_that_does_not_start_ends_the_run_soon(
    agent: PtraceAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptrace, "READY_SECONDS", 0.2)
    inject = agent._inject_all

    def inject_and_stop() -> None:
        inject()
        wait_for(lambda: agent._helpers[0].read_header().ready, "the helper has started")
        stop(agent)
        agent._helpers[0].write_word("ready", 0)

    monkeypatch.setattr(agent, "_inject_all", inject_and_stop)
    started = time.monotonic()
    with pytest.raises(AgentError, match=r"did not start within 0\.2 s"):
        asyncio.run(agent.start())
    assert time.monotonic() - started < 4
    os.kill(agent.process.pid, signal.SIGCONT)
    wait_clean(agent.process.pid)


def test_failed_run_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that neither the helper, nor its ticker, nor the run gate delays the end."""
    monkeypatch.setattr(ptrace, "NO_PROGRESS_SECONDS", dict.fromkeys(Kind, 0.5))
    with start_target() as target:
        pid = target.process.pid
        agent = PtraceAgent(Process.find(pid), [VcpuThread(target.tid, 0, 0)])
        inject = agent._inject_all

        def inject_without_timer() -> None:
            inject()
            agent._allowed = replace(agent._allowed, timers=False)

        monkeypatch.setattr(agent, "_inject_all", inject_without_timer)

        async def check() -> None:
            await agent.start()
            await agent.hold_vcpus()
            assert agent._ticker is not None and agent._gate is not None
            children = agent._ticker._child, agent._gate._child
            stop(agent)
            with pytest.raises(AgentError, match="made no progress"):
                await agent.run({0: [Range(Kind.POPULATE, 0x10000, 4096)]}, lambda done: None)
            started = time.monotonic()
            await agent.close()
            assert time.monotonic() - started < 3
            for child in children:
                with pytest.raises(ProcessLookupError):
                    os.kill(child, 0)

        asyncio.run(check())
        assert not tracers(pid)
        os.kill(pid, signal.SIGCONT)
        wait_clean(pid)
        target.end_thread()


@pytest.mark.parametrize("value", [2, 4096, 1 << 31, (1 << 32) - 4096])
def test_invalid_ready_is_an_error(agent: PtraceAgent, value: int) -> None:
    async def check() -> None:
        await agent.start()
        helper = agent._helpers[0]
        helper.write_word("ready", value)
        with pytest.raises(AgentError, match="overwritten its control page"):
            await agent._wait_ready()
        await agent.close()

    asyncio.run(check())
    wait_clean(agent.process.pid)
