# SPDX-License-Identifier: GPL-2.0-or-later
"""Resume a guest that this process has paused, even if this process is killed.

Before this process sends ``stop``, it forks a child process, the resume guard. The resume guard
inherits the read end of a pipe. Only this process has the pipe's write end. The resume guard also
inherits this process's QMP connection, because QEMU accepts no other client while that connection
is open. If the pipe is closed without data, this process has exited or was killed. The resume guard
then stops the helpers and waits until they have exited. Unless the guest has migrated away, the
resume guard sends ``cont`` on the QMP connection.
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

#: This byte resets QEMU's JSON parser after an incomplete command (qobject/json-lexer.c).
RESET_PARSER = b"\xff"
REPLY_ID = "qemu-prefault-guard"
#: Upper bound on the size of the replies to query-status and cont, in bytes.
LONGEST_ANSWER = 4096


class ResumeGuard:
    """A context manager that runs the resume guard while the guest is paused."""

    def __init__(self, qmp_fd: int, cleanup: OrphanCleanup) -> None:
        """Store the arguments.

        :param qmp_fd: The file descriptor of this process's negotiated QMP connection.
        :param cleanup: The functions that stop the agent's helpers. The resume guard resumes the
            guest when the helpers have exited, or when the cleanup's timeout has expired.
        """
        self._qmp_fd = qmp_fd
        self._cleanup = cleanup
        self._pipe = -1
        self._child = 0

    def __enter__(self) -> ResumeGuard:
        """Start the resume guard, and wait until it is ready.

        :raises FailedError: If the resume guard exited before it was ready. The guest is not paused
            yet.
        """
        read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
        ready, is_ready = os.pipe2(os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._pipe)
                self._watch(read_end, is_ready)
            finally:
                os._exit(0)
        os.close(read_end)
        os.close(is_ready)
        try:
            if not os.read(ready, 1):
                self.__exit__()
                raise FailedError(
                    "the resume guard exited, so no process would resume the guest if this process "
                    "were killed",
                    "check the kernel log (dmesg) for the reason, for example the OOM killer\n"
                    "The guest was not paused",
                    code=Code.GUARD,
                )
        finally:
            os.close(ready)
        return self

    def __exit__(self, *_: object) -> None:
        """End the resume guard without resuming the guest."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, b"done")
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    def _watch(self, read_end: int, is_ready: int) -> None:
        """Wait in the child process, and resume the guest if the parent is killed."""
        os.setsid()  # so that signals from the terminal do not reach this process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.write(is_ready, b"s")
        os.close(is_ready)
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
            # A guest that has migrated away runs on the destination.
            if not any(f'"{away}"'.encode() in status for away in MIGRATED_AWAY):
                _ask(connection, b"", "cont")


def _ask(connection: socket.socket, before: bytes, command: str) -> bytes:
    """Send a command, wait for its reply, and return the last received bytes."""
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
