# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the resume guard with a QEMU that sends data without end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from qemu_prefault.engine import resume_guard
from qemu_prefault.engine.resume_guard import ResumeGuard

MIB = 1 << 20
EVENT = json.dumps({"event": "X", "timestamp": {}, "data": {}}).encode() + b"\r\n"


class Flood:
    """A QEMU that sends events for some time, and then replies to commands.

    :ivar sent: The number of bytes of the events.
    :ivar commands: The names of the commands that QEMU has received.
    """

    def __init__(self, server: socket.socket, seconds: float) -> None:
        self.sent = 0
        self.commands: list[str] = []
        self._server = server
        self._seconds = seconds

    def run(self) -> None:
        ends_at = time.monotonic() + self._seconds
        noise = EVENT * 1000
        with contextlib.suppress(OSError), self._server.makefile("rb") as requests:
            while time.monotonic() < ends_at:
                self.sent += self._server.send(noise)
            for line in requests:
                request = json.loads(line.removeprefix(resume_guard.RESET_PARSER))
                self.commands.append(request["execute"])
                reply = {"return": {"status": "paused"}, "id": request["id"]}
                # The event before the reply may be incomplete.
                self._server.sendall(b"\r\n" + json.dumps(reply).encode() + b"\r\n")


@contextlib.contextmanager
def flood(seconds: float) -> Iterator[tuple[Flood, socket.socket]]:
    client, server = socket.socketpair()
    with client, server:
        peer = Flood(server, seconds)
        thread = threading.Thread(target=peer.run)
        thread.start()
        try:
            yield peer, client
        finally:
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_flood_costs_little_and_the_guest_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_guard, "FAST_READS", 16)
    with flood(2.0) as (peer, client):
        ResumeGuard(client.detach(), None)._resume()  # type: ignore[arg-type]
    assert peer.commands == ["query-status", "cont"]
    assert peer.sent < 8 * MIB


def test_flood_does_not_delay_the_time_limit() -> None:
    with flood(30.0) as (_, client):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            resume_guard._ask(client, b"", "query-status", started + 0.5)
        assert time.monotonic() - started < 5
