# SPDX-License-Identifier: GPL-2.0-or-later
"""Resume a guest that this process has paused, even if this process is killed.

Before this process sends ``stop``, it forks a child process, the resume guard. The resume guard
inherits the read end of a pipe. Only this process has the pipe's write end. The resume guard also
inherits this process's QMP connection, because QEMU accepts no other client while that connection
is open. If the pipe is closed without data, this process has exited or was killed. The resume guard
then stops the helpers and waits until they have exited. Unless the guest has migrated away, the
resume guard sends ``cont`` on the QMP connection.

If QEMU does not reply in time, this process gives up, and the resume guard waits for the reply.
QEMU may execute ``stop`` later, for example when a slow disk has written its data. If this process
has already sent ``cont``, the resume guard only keeps the connection open: when the connection is
closed, QEMU drops the commands that it has not executed (monitor_qmp_cleanup_queue_and_resume(),
monitor/qmp.c).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator

from ..agents.base import OrphanCleanup
from ..errors import Code, FailedError, MonitorError
from ..host.foreign_fds import DataSocket, DescriptorsError
from ..qemu.monitor import Monitor
from .preflight import MIGRATED_AWAY

#: This byte resets QEMU's JSON parser after an incomplete command (qobject/json-lexer.c).
RESET_PARSER = b"\xff"
REPLY_ID = "qemu-prefault-guard"
#: Upper bound on the size of the replies to query-status and cont, in bytes.
LONGEST_ANSWER = 4096
#: Seconds that the resume guard waits for QEMU's replies.
GUARD_SECONDS = 3600.0
#: Number of reads per reply without a pause. The resume guard pauses before each further read.
#: Otherwise a QEMU that sends data without end would occupy a CPU for :data:`GUARD_SECONDS`.
FAST_READS = 256
#: Length of the pause in seconds. Meanwhile QEMU fills the socket's buffer, so the next read can
#: return more data.
READ_PAUSE = 0.05


class ResumeGuard:
    """A context manager that runs the resume guard while the guest is paused.

    :ivar cont_sent: Whether this process has sent ``cont``.
    """

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
        self._handed_over = False
        self.cont_sent = False

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
        """End the resume guard without resuming the guest, unless the guard has to resume it."""
        order = b"done"
        if self._handed_over:
            order = b"wait" if self.cont_sent else b""
        with contextlib.suppress(OSError):
            os.write(self._pipe, order)
        os.close(self._pipe)
        if self._handed_over:
            threading.Thread(target=os.waitpid, args=(self._child, 0), daemon=True).start()
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    @contextlib.asynccontextmanager
    async def hand_over_on_failure(self, monitor: Monitor) -> AsyncIterator[None]:
        """Let the resume guard resume the guest if the block cannot.

        This is the case if QEMU does not reply in time within the block, or if this process has
        ended the QMP session because of a malformed message. This process then closes its QMP
        connection, because only one process can read the replies.

        :raises MonitorError: If the resume guard resumes the guest.
        """
        try:
            yield
        except BaseException as error:
            late = isinstance(error, MonitorError) and error.code is Code.MONITOR_TIMEOUT
            if monitor.alive and not late:
                raise
            self._handed_over = True
            await monitor.close()
            if not isinstance(error, MonitorError) or error.code is Code.MONITOR_CLOSED:
                raise
            raise MonitorError(
                error.cause,
                f"{error.remedy}\nProcess {self._child} waits for QEMU, so that the guest resumes",
                code=error.code,
            ) from error

    def _watch(self, read_end: int, is_ready: int) -> None:
        """Wait in the child process, and resume the guest if the parent is killed."""
        os.setsid()  # so that signals from the terminal do not reach this process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.write(is_ready, b"s")
        os.close(is_ready)
        order = os.read(read_end, 8)
        if order == b"done":
            return
        if order == b"wait":
            self._resume(only_wait=True)
            return
        with contextlib.suppress(OSError):
            self._cleanup.stop_helpers()
        deadline = time.monotonic() + self._cleanup.timeout
        while not self._cleanup.helpers_gone() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._resume()

    def _resume(self, only_wait: bool = False) -> None:
        deadline = time.monotonic() + GUARD_SECONDS
        with contextlib.suppress(OSError), DataSocket(fileno=self._qmp_fd) as connection:
            status = _ask(connection, RESET_PARSER, "query-status", deadline)
            if only_wait:
                return
            # A guest that has migrated away runs on the destination.
            if not any(f'"{away}"'.encode() in status for away in MIGRATED_AWAY):
                _ask(connection, b"", "cont", deadline)


def _ask(connection: socket.socket, before: bytes, command: str, deadline: float) -> bytes:
    """Send a command, wait for its reply, and return the last received bytes.

    If the peer has sent file descriptors, the function returns no bytes, because it cannot read
    replies.

    :param deadline: The time of the monotonic clock in seconds at which the wait ends.
    :raises TimeoutError: If the reply has not arrived by the deadline.
    """
    identity = f"{REPLY_ID}-{command}"
    message = json.dumps({"execute": command, "id": identity}).encode()
    connection.settimeout(max(deadline - time.monotonic(), 0.1))
    connection.sendall(before + message + b"\n")
    received = b""
    reads = 0
    while identity.encode() not in received:
        if reads >= FAST_READS:
            time.sleep(READ_PAUSE)
        reads += 1
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        try:
            data = connection.recv(65536)
        except DescriptorsError:
            return b""
        if not data:
            raise ConnectionResetError
        received = received[-LONGEST_ANSWER:] + data
    return received
