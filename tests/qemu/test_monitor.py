# SPDX-License-Identifier: GPL-2.0-or-later
"""Test clients, events, counters and disconnection with a real QEMU's monitor."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.errors import (
    CommandError,
    ExitStatus,
    InputError,
    MonitorBusyError,
    MonitorError,
    QemuPrefaultError,
    RefusedError,
)
from qemu_prefault.host.fds import kvm_fds
from qemu_prefault.host.identify import identify
from qemu_prefault.host.procfs import Process
from qemu_prefault.qemu.dial import parse_address
from qemu_prefault.qemu.kvm_stats import read_stage2, read_vcpu_stats
from qemu_prefault.qemu.monitor import Monitor
from qemu_prefault.qemu.queries import read_vm_state

StartQemu = Callable[..., Any]  # conftest.py


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(main)


def test_session(start_qemu: StartQemu, accel: str) -> None:
    qemu = start_qemu("-m", "64M", accel=accel)

    async def main() -> None:
        async with Monitor.connect(f"unix:{qemu.qmp}") as monitor:
            assert monitor.alive
            assert monitor.peer_pid == qemu.pid
            assert os.readlink(f"/proc/self/fd/{monitor.fileno()}").startswith("socket:")
            assert await monitor.execute("query-name") == {}
            assert "VM status: paused" in await monitor.hmp("info status")
            with pytest.raises(CommandError) as caught:
                await monitor.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"
            machine = await read_vm_state(monitor)
            assert monitor.version == machine.version
            process = identify(monitor.peer_pid, None, [vcpu.thread_id for vcpu in machine.vcpus])
            assert process == Process.find(qemu.pid)
            assert set(kvm_fds(process).vcpus) == ({0} if accel == "kvm" else set())
        assert not monitor.alive
        with pytest.raises(MonitorError):
            await monitor.execute("query-name")

    run(main())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("busy", [False, True])
def test_silent_tcp_socket_is_not_called_busy(start_qemu: StartQemu, busy: bool) -> None:
    """Check that a websocket, which waits for its client, is not called a busy monitor."""
    port = free_port()
    options = f"host=127.0.0.1,port={port},server=on,wait=off,websocket={'off' if busy else 'on'}"
    start_qemu("-m", "64M", "-chardev", f"socket,id=c,{options}", "-mon", "c,mode=control")

    async def main() -> None:
        error = MonitorBusyError if busy else MonitorError
        with socket.create_connection(("127.0.0.1", port)) if busy else nullcontext() as other:
            if other is not None:
                other.recv(1, socket.MSG_PEEK)  # QEMU's greeting
            with pytest.raises(error) as caught:
                async with Monitor.connect(f"tcp:127.0.0.1:{port}"):
                    pass
        assert caught.value.code == ("monitor-busy" if busy else "monitor-silent")
        assert busy or "websocket=on" in caught.value.remedy

    run(main())


def test_abstract_socket_is_not_supported(start_qemu: StartQemu, tmp_path: Path) -> None:
    name = f"qemu-prefault-{os.getpid()}"
    start_qemu("-m", "64M", "-qmp", f"unix:{name},server=on,wait=off,abstract=on")

    async def main() -> None:
        with pytest.raises(InputError, match="does not support abstract sockets"):
            async with Monitor.connect(f"@{name}"):
                pass

    run(main())


def test_second_client_is_refused_and_can_retry(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as first:
            for _ in range(3):  # a failed attempt must not affect the next one
                start = time.monotonic()
                with pytest.raises(MonitorBusyError, match="one client at a time") as caught:
                    async with Monitor.connect(qemu.qmp):
                        pass
                assert time.monotonic() - start < 2
                assert caught.value.exit_status == ExitStatus.REFUSED
                assert caught.value.code == "monitor-busy"
                assert "second" in caught.value.remedy
            # QEMU must not have executed commands from the waiting clients.
            assert await first.execute("query-name") == {}
        async with Monitor.connect(qemu.qmp) as again:
            assert again.alive

    run(main())


def test_full_backlog_fails_fast(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        waiting = []
        async with Monitor.connect(qemu.qmp):
            for _ in range(8):  # QEMU listens with a backlog of 1
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                waiting.append(sock)
                if sock.connect_ex(qemu.qmp) != 0:
                    break
            else:
                pytest.skip("QEMU's backlog is longer than eight clients")
            start = time.monotonic()
            with pytest.raises(MonitorBusyError, match="more clients are waiting"):
                async with Monitor.connect(qemu.qmp):
                    pass
            assert time.monotonic() - start < 1
        for sock in waiting:
            sock.close()

    run(main())


def test_two_monitors_of_one_qemu(start_qemu: StartQemu, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    qemu = start_qemu("-m", "64M", "-qmp", f"unix:{other},server=on,wait=off")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as one, Monitor.connect(other) as two:
            with two.events("STOP", "RESUME") as events:
                await one.execute("cont")
                await one.execute("stop")
                names = [(await events.get(10)), (await events.get(10))]
                assert [event.name for event in names if event] == ["RESUME", "STOP"]
                assert all(event and event.seconds > 1.6e9 for event in names)
                with pytest.raises(TimeoutError):
                    await events.get(0.01)

    run(main())


async def _await_end(monitor: Monitor) -> int:
    with monitor.events() as stream:
        return len([event async for event in stream])


@pytest.mark.parametrize("command", ["query-status", "human-monitor-command"])
def test_qemu_killed_during_a_command(start_qemu: StartQemu, command: str) -> None:
    """Check that pending and later commands fail, and that the session can be closed."""
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            waiting = asyncio.create_task(_await_end(monitor))
            qemu.pause()  # so that QEMU cannot reply to the commands
            arguments = {"command-line": "info mtree"} if "human" in command else {}
            tasks = [
                asyncio.create_task(monitor.execute_raw(command, arguments)) for _ in range(12)
            ]
            await asyncio.sleep(0)
            await asyncio.to_thread(qemu.kill)
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(answer, MonitorError) and answer.code == "monitor-closed"
            await asyncio.wait_for(waiting, 5)
            assert not monitor.alive
            with pytest.raises(MonitorError, match="closed the QMP connection"):
                await monitor.execute("query-status")
            with monitor.events() as stream:
                assert await stream.get() is None

    run(main())


def test_quit_during_read(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            quitting = asyncio.create_task(monitor.execute("quit"))
            await asyncio.sleep(0)
            with pytest.raises(MonitorError):
                for _ in range(1000):
                    await read_vm_state(monitor)
            await asyncio.wait([quitting])

    run(main())


def test_stopped_qemu_times_out(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp, command_timeout=0.2) as monitor:
            qemu.pause()
            with pytest.raises(MonitorError, match=r"within 0\.2 s") as caught:
                await monitor.execute("query-status")
            assert caught.value.code == "monitor-timeout"
            qemu.resume()
            # The late reply is dropped. The next command gets its own reply.
            assert await monitor.execute("query-name", timeout=10) == {}

    run(main())


def test_connect_to_stopped_qemu_times_out(start_qemu: StartQemu) -> None:
    """Check that a stopped QEMU is not reported as a busy socket."""
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        qemu.pause()
        start = time.monotonic()
        with pytest.raises(MonitorError, match="stopped or blocked"):
            async with Monitor.connect(qemu.qmp, connect_timeout=1):
                pass
        assert time.monotonic() - start < 2
        qemu.resume()
        async with Monitor.connect(qemu.qmp):
            pass

    run(main())


def test_unread_events_are_bounded(start_qemu: StartQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_prefault.qemu.events.MAX_EVENTS", 4)
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            with monitor.events("STOP") as stream, monitor.events("RESUME") as other:
                for _ in range(7):
                    await monitor.execute("cont")
                    await monitor.execute("stop")
                assert (len(stream._events), stream.dropped) == (4, 3)
                assert await other.get(1) is not None
            assert monitor._client.events.history == ()

    run(main())


def test_tcp(start_qemu: StartQemu) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    qemu = start_qemu("-m", "64M", "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")

    async def main() -> None:
        async with Monitor.connect(f"127.0.0.1:{port}") as monitor:
            assert monitor.peer_pid is None
            machine = await read_vm_state(monitor)
            threads = [vcpu.thread_id for vcpu in machine.vcpus]
            assert identify(None, None, threads).pid == qemu.pid
            with pytest.raises(MonitorBusyError, match="probably because another QMP client"):
                async with Monitor.connect(f"tcp:localhost:{port}"):
                    pass
        qemu.kill()
        with pytest.raises(MonitorError, match="cannot connect"):
            async with Monitor.connect(f"tcp:localhost:{port}"):
                pass

    run(main())


def test_proxy_is_detected(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that a process that forwards the socket is not mistaken for QEMU."""
    qemu = start_qemu("-m", "64M")
    front = str(tmp_path / "front")
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _forward(front, qemu.qmp, tell)
    os.read(ready, 1)
    try:

        async def main() -> None:
            async with Monitor.connect(front) as monitor:
                assert monitor.peer_pid == pid
                machine = await read_vm_state(monitor)
                threads = [vcpu.thread_id for vcpu in machine.vcpus]
                with pytest.raises(RefusedError) as caught:
                    identify(monitor.peer_pid, None, threads)
                assert caught.value.code == "proxy"
                assert str(qemu.pid) in caught.value.cause
                assert identify(monitor.peer_pid, qemu.pid, threads).pid == qemu.pid

        run(main())
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def _forward(front: str, back: str, tell: int) -> None:
    """Forward one client of ``front`` to ``back``, and exit this child process."""
    import select  # noqa: PLC0415

    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(front)
        listener.listen(1)
        os.write(tell, b"x")
        here, there = listener.accept()[0], socket.socket(socket.AF_UNIX)
        there.connect(back)
        while True:
            for source in select.select([here, there], [], [])[0]:
                data = source.recv(65536)
                if not data:
                    return
                (there if source is here else here).sendall(data)
    finally:
        os._exit(0)


# --- addresses ---


@pytest.mark.parametrize(
    ("address", "want"),
    [
        ("/run/qmp.sock", "/run/qmp.sock"),
        ("unix:host:1234", "host:1234"),
        ("./host:1234", "./host:1234"),
        ("host:1234", ("host", 1234)),
        (":1234", ("localhost", 1234)),
        ("tcp:[::1]:44", ("::1", 44)),
    ],
)
def test_addresses(address: str, want: object) -> None:
    assert parse_address(address) == want


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp:", "tcp:host", "tcp:h:0", "h:65536", "a\0b", "x" * 108]
)
def test_impossible_addresses(address: str) -> None:
    with pytest.raises(InputError):
        parse_address(address)


def attempt(address: str, timeout: float = 5.0) -> QemuPrefaultError:
    async def main() -> None:
        async with Monitor.connect(address, connect_timeout=timeout):
            raise AssertionError("connected")

    with pytest.raises((MonitorError, InputError)) as caught:
        run(main())
    return caught.value


def test_absent_socket(tmp_path: Path) -> None:
    assert "does not exist" in attempt(str(tmp_path / "none")).cause


def test_regular_file_is_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = attempt(str(tmp_path / "file"))
    assert "is not a socket" in error.cause and error.exit_status == ExitStatus.USAGE


def test_socket_of_a_dead_qemu(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M")
    qemu.kill()
    assert "no process listens" in attempt(qemu.qmp).cause


@pytest.mark.skipif(os.geteuid() != 0, reason="changes users")
def test_no_permission(start_qemu: StartQemu, tmp_path: Path) -> None:
    qemu = start_qemu("-m", "64M")
    for path in (tmp_path, *tmp_path.parents):
        os.chmod(path, 0o755) if path.owner() == "root" and path != Path("/tmp") else None
    os.chmod(qemu.qmp, 0o700)
    os.seteuid(65534)
    try:
        error = attempt(qemu.qmp)
    finally:
        os.seteuid(0)
    assert "no permission" in error.cause and "root" in error.remedy


def test_human_monitor_is_not_qmp(start_qemu: StartQemu, tmp_path: Path) -> None:
    hmp = str(tmp_path / "hmp")
    start_qemu("-m", "64M", "-monitor", f"unix:{hmp},server=on,wait=off")
    error = attempt(hmp)
    assert "human monitor" in error.cause and "-qmp" in error.remedy


# --- counters ---


def test_stage2_counters(start_qemu: StartQemu, accel: str) -> None:
    qemu = start_qemu("-m", "64M", "-smp", "2", accel=accel)

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            stage2 = await read_stage2(monitor)
            vcpus = await read_vcpu_stats(monitor, ["exits", "pf_taken", "no_such_counter"])
            if accel == "tcg":
                assert stage2 is None and vcpus == {}
                return
            assert stage2 is not None and stage2.bytes == 0
            machine = await read_vm_state(monitor)
            assert set(vcpus) == {vcpu.qom_path for vcpu in machine.vcpus}
            assert all(set(stats) == {"exits", "pf_taken"} for stats in vcpus.values())

    run(main())
