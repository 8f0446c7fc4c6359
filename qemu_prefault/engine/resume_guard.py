# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that we paused is resumed even if we are killed.

Before ``stop`` goes out, a child process is forked. It holds the read end of a pipe whose
write end only we have, and our own QMP connection (QEMU would let nobody else in before we
are gone). When the pipe breaks without a word, we have died: it sends the helpers away,
waits until they have left, and sends ``cont`` on that connection, if the guest is still here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time

from ..agents.base import OrphanCleanup
from ..errors import Code, FailedError
from .preflight import MIGRATED_AWAY

RESET_PARSER = b"\xff"  # QEMU's JSON parser starts afresh after this byte, whatever we had sent
REPLY_ID = "qemu-prefault-guard"
LONGEST_ANSWER = 4096  # bytes, of query-status and cont


class ResumeGuard:
    """Context manager around the time in which the guest is paused by our doing."""

    def __init__(self, qmp_fd: int, cleanup: OrphanCleanup) -> None:
        """
        :param qmp_fd: our negotiated QMP connection.
        :param cleanup: how the agent's work is ended; the guest is resumed when it has, or when
            the patience is over.
        """
        self._qmp_fd = qmp_fd
        self._cleanup = cleanup
        self._pipe = -1
        self._child = 0

    def __enter__(self) -> ResumeGuard:
        """
        :raises FailedError: if the guard died before it stood; nothing has been paused then.
        """
        read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
        ready, stands = os.pipe2(os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._pipe)
                self._watch(read_end, stands)
            finally:
                os._exit(0)
        os.close(read_end)
        os.close(stands)
        try:
            if not os.read(ready, 1):
                self.__exit__()
                raise FailedError(
                    "the process that was to guard the paused guest died at once",
                    "see dmesg for who killed it; the guest was not paused",
                    code=Code.GUARD,
                )
        finally:
            os.close(ready)
        return self

    def __exit__(self, *_: object) -> None:
        """The guest has been resumed, or is meant to stay paused: the guard goes."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, b"done")
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    # -- in the child ------------------------------------------------------------------

    def _watch(self, read_end: int, stands: int) -> None:
        os.setsid()  # what ends our terminal or its job does not end the guard
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.write(stands, b"s")
        os.close(stands)
        if os.read(read_end, 8):
            return
        with contextlib.suppress(OSError):
            self._cleanup.stop_helpers()
        deadline = time.monotonic() + self._cleanup.timeout
        while not self._cleanup.helpers_gone() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._resume()

    def _resume(self) -> None:
        connection = socket.socket(fileno=self._qmp_fd)
        connection.settimeout(30)
        with contextlib.suppress(OSError):
            status = _ask(connection, RESET_PARSER, "query-status")
            # A guest that has migrated away meanwhile runs elsewhere.
            if not any(f'"{away}"'.encode() in status for away in MIGRATED_AWAY):
                _ask(connection, b"", "cont")


def _ask(connection: socket.socket, before: bytes, command: str) -> bytes:
    """Send a command, wait for its answer; the end of all that came until then."""
    identity = f"{REPLY_ID}-{command}"
    message = json.dumps({"execute": command, "id": identity}).encode()
    connection.sendall(before + message + b"\n")
    received = b""
    while identity.encode() not in received:
        select.select([connection], [], [], 30)
        data = connection.recv(65536)
        if not data:
            raise ConnectionResetError
        received = received[-LONGEST_ANSWER:] + data
    return received
