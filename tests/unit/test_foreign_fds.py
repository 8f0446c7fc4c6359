# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool with peers that send file descriptors whose close blocks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import Control
from qemu_prefault.engine.resume_guard import ResumeGuard
from qemu_prefault.errors import AgentError, GoneError, MonitorError
from qemu_prefault.host import fds, foreign_fds
from qemu_prefault.host.foreign_fds import DataSocket, DescriptorsError, close_foreign
from qemu_prefault.host.procfs import Process
from qemu_prefault.qemu.monitor import Monitor
from support.hostile_plugin import HONEST
from support.hostile_qemu import GREETING
from support.lingering import lingering_socket, send_descriptor

#: The longest duration of a call in seconds, with the time of a slow host.
SHORT = 3
Talk = Callable[[socket.socket], None]
Connect = Callable[[], tuple[DataSocket, socket.socket]]


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 2 * SHORT


@pytest.fixture(params=["Linux 6.16", "Linux 6.15"])
def refuses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the kernel refuses descriptors."""
    if request.param == "Linux 6.15":
        monkeypatch.setattr(foreign_fds, "SO_PASSRIGHTS", 9999)
        return False
    with DataSocket() as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, foreign_fds.SO_PASSRIGHTS)
        except OSError:
            pytest.skip("this kernel lacks SO_PASSRIGHTS")
    return True


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Return a function that returns a connected socket, and the peer's end."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def connected() -> tuple[DataSocket, socket.socket]:
            client = stack.enter_context(DataSocket())
            client.settimeout(SHORT)
            client.connect(str(tmp_path / "s"))
            peer = stack.enter_context(listener.accept()[0])
            peer.settimeout(SHORT)
            return client, peer

        yield connected


def test_data_is_received(refuses: bool, connect: Connect) -> None:
    client, peer = connect()
    for part in (b"one", b"two", b"x" * 100_000):
        peer.sendall(part)
    peer.close()
    assert client.recv(2, socket.MSG_PEEK) == b"on"
    assert client.recv(2) == b"on"
    received = b""
    while data := client.recv(1 << 17):
        received += data
    assert received == b"etwo" + b"x" * 100_000


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_descriptors_are_refused(refuses: bool, connect: Connect, flags: int) -> None:
    client, peer = connect()
    peer.sendall(b"before")
    assert client.recv(100) == b"before"
    assert send_descriptor(peer, b"d", flags) is not refuses
    if refuses:
        assert client.recv(100) == b"d"
        return
    for peek in (socket.MSG_PEEK, 0):
        with pytest.raises(DescriptorsError):
            client.recv(100, peek)


def test_descriptors_need_no_free_descriptor(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_fds, "SO_PASSRIGHTS", 9999)
    client, peer = connect()
    assert send_descriptor(peer, b"d")
    used: list[int] = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            used.append(os.dup(0))
    try:
        with pytest.raises(DescriptorsError):
            client.recv(100)
    finally:
        for fd in used:
            os.close(fd)


def test_close_with_unread_descriptors_is_short(refuses: bool, connect: Connect) -> None:
    client, peer = connect()
    send_descriptor(peer, b"d")
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < foreign_fds.RELEASE_SECONDS + 0.5
    peer.setblocking(False)
    with contextlib.suppress(ConnectionResetError):  # the message was unread
        assert peer.recv(1) == b"", "the connection is still open"
    client.close()


def test_discarded_socket_needs_no_process(
    refuses: bool, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, peer = connect()
    monkeypatch.setattr(foreign_fds, "close_foreign", None)
    client.discard()
    assert peer.recv(1) == b""


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_discard_with_unread_descriptors_is_short(
    refuses: bool, connect: Connect, flags: int
) -> None:
    client, peer = connect()
    send_descriptor(peer, b"d", flags)
    started = time.monotonic()
    client.discard()
    assert time.monotonic() - started < foreign_fds.RELEASE_SECONDS + 0.5


def test_closed_socket_leaves_no_process(refuses: bool, connect: Connect) -> None:
    for _ in range(3):
        client, _ = connect()
        client.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_descriptor_is_closed_if_fork_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = set(os.listdir("/proc/self/fd"))
    fd = os.dup(0)
    monkeypatch.setattr(os, "fork", fork)
    close_foreign(fd)
    assert set(os.listdir("/proc/self/fd")) == before


def test_replaced_descriptor_is_closed_in_time() -> None:
    """Check a descriptor that QEMU has replaced before the tool has duplicated it."""
    fd = lingering_socket().detach()
    with pytest.raises(GoneError, match="no longer"):
        fds._checked(Process.find(os.getpid()), 7, fd, "anon_inode:kvm-vcpu:0")


@contextlib.contextmanager
def serve(path: Path, talk: Talk) -> Iterator[str]:
    """Accept one client in a thread, and pass it to ``talk``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def main() -> None:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):  # the client disconnected
                client.settimeout(2 * SHORT)
                talk(client)

        thread = threading.Thread(target=main)
        thread.start()
        yield str(path)
        thread.join()


def line(document: object) -> bytes:
    return json.dumps(document).encode() + b"\n"


EVENT = line({"event": "NOISE", "timestamp": {}, "data": {}})


def negotiate(client: socket.socket) -> None:
    client.sendall(line(GREETING))
    client.recv(4096)
    client.sendall(line({"return": {}}))


async def query(path: str) -> object:
    async with Monitor.connect(path, connect_timeout=SHORT, command_timeout=SHORT) as monitor:
        return await monitor.execute("query-kvm")


def expect_refusal(path: str, refuses: bool, cause: str) -> None:
    if refuses:
        assert asyncio.run(query(path)) == {"present": True}
        return
    with pytest.raises(MonitorError) as caught:
        asyncio.run(query(path))
    assert caught.value.code == "monitor-not-qmp"
    assert cause in caught.value.cause


def test_descriptors_in_events(refuses: bool, tmp_path: Path) -> None:
    """Send the descriptors after so many events that the tool reads the events first."""

    def talk(client: socket.socket) -> None:
        negotiate(client)
        identity = json.loads(client.recv(4096))["id"]
        client.sendall(EVENT * 100)
        for _ in range(10):
            send_descriptor(client, EVENT)
        client.sendall(line({"return": {"present": True}, "id": identity}))
        client.recv(4096)

    with serve(tmp_path / "s", talk) as path:
        expect_refusal(path, refuses, "during query-kvm it sent file descriptors")


def test_descriptors_in_greeting(refuses: bool, tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        send_descriptor(client, line(GREETING))
        client.recv(4096)
        client.sendall(line({"return": {}}))
        identity = json.loads(client.recv(4096))["id"]
        client.sendall(line({"return": {"present": True}, "id": identity}))
        client.recv(4096)

    with serve(tmp_path / "s", talk) as path:
        expect_refusal(path, refuses, "is not a QMP server: it sent file descriptors")


def test_descriptors_after_greeting(refuses: bool, tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        client.sendall(line(GREETING))
        client.recv(4096)
        send_descriptor(client, line({"return": {}}))
        identity = json.loads(client.recv(4096))["id"]
        client.sendall(line({"return": {"present": True}, "id": identity}))
        client.recv(4096)

    with serve(tmp_path / "s", talk) as path:
        expect_refusal(path, refuses, "is not a QMP server: file descriptors")


def test_descriptors_from_the_plugin(refuses: bool, tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        client.recv(4096)
        send_descriptor(client, line(HONEST))
        client.recv(4096)

    async def ask(path: str) -> None:
        async with Control.open(Path(path), os.getpid()):
            pass

    with serve(tmp_path / "s", talk) as path:
        if refuses:
            asyncio.run(ask(path))
        else:
            with pytest.raises(AgentError, match="it contains file descriptors"):
                asyncio.run(ask(path))


def test_resume_guard_does_not_receive_descriptors(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_fds, "SO_PASSRIGHTS", 9999)
    client, peer = connect()
    send_descriptor(peer, b"d")
    guard = ResumeGuard(os.dup(client.fileno()), None)  # type: ignore[arg-type]
    guard._resume()
    assert b"query-status" in peer.recv(4096)
