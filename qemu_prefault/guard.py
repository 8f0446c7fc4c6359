# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that we paused is resumed even if we are killed.

Before ``stop`` goes out, a child process is forked. It holds the read end of a pipe whose
write end only we have, and our own QMP connection (QEMU would let nobody else in before we
are gone). When the pipe breaks without a word, we have died: it sends the helpers away,
waits until they have left, and sends ``cont`` on that connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time

from .agents import DeathOrders

RESET_PARSER = b"\xff"  # QEMU's JSON parser starts afresh after this byte, whatever we had sent
REPLY_ID = "qemu-prefault-guard"


class ResumeGuard:
    """Context manager around the time in which the guest is paused by our doing."""

    def __init__(self, qmp_fd: int, orders: DeathOrders) -> None:
        """
        :param qmp_fd: our negotiated QMP connection.
        :param orders: how the agent's work is ended; the guest is resumed when it has, or when
            the patience is over.
        """
        self._qmp_fd = qmp_fd
        self._orders = orders
        self._pipe = -1
        self._child = 0

    def __enter__(self) -> ResumeGuard:
        read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._pipe)
                self._watch(read_end)
            finally:
                os._exit(0)
        os.close(read_end)
        return self

    def __exit__(self, *_: object) -> None:
        """The guest has been resumed, or is meant to stay paused: the guard goes."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, b"done")
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    # -- in the child ------------------------------------------------------------------

    def _watch(self, read_end: int) -> None:
        os.setsid()  # what ends our terminal or its job does not end the guard
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if os.read(read_end, 8):
            return
        with contextlib.suppress(OSError):
            self._orders.send_away()
        deadline = time.monotonic() + self._orders.patience
        while not self._orders.gone() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._resume()

    def _resume(self) -> None:
        connection = socket.socket(fileno=self._qmp_fd)
        connection.settimeout(30)
        command = json.dumps({"execute": "cont", "id": REPLY_ID}).encode()
        with contextlib.suppress(OSError):
            connection.sendall(RESET_PARSER + command + b"\n")
            received = b""
            while REPLY_ID.encode() not in received:
                select.select([connection], [], [], 30)
                data = connection.recv(65536)
                if not data:
                    break
                received = received[-len(REPLY_ID) :] + data
