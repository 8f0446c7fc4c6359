# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's serial line, which is a console or the workload's command line."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
from collections.abc import Callable

_TERMINAL = re.compile(rb"\x1b\[[0-9;=?]*[A-Za-z]")  # UEFI clears the screen before Linux starts

Answer = dict[str, float | str]


class Serial:
    """One serial line.

    :param line: A connected socket. This object closes it.
    :param make_error: A function that returns the exception to raise for a cause.
    :param pidfd: A pidfd of the QEMU process. A wait fails when this process exits. If None, a wait
        fails when QEMU closes the socket.
    :ivar log: All bytes received so far.
    """

    def __init__(
        self, line: socket.socket, make_error: Callable[[str], Exception], pidfd: int | None = None
    ) -> None:
        self._socket = line
        self._socket.setblocking(False)
        self._make_error = make_error
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)
        if pidfd is not None:
            self._poll.register(pidfd, select.POLLIN)
        self._buffer = b""
        self.log = b""

    def close(self) -> None:
        self._socket.close()

    def forget(self) -> None:
        """Discard the output received so far."""
        with contextlib.suppress(BlockingIOError):
            while data := self._socket.recv(1 << 16):
                self.log += data
        self._buffer = b""

    def send(self, text: str) -> None:
        """Send the text.

        If the connection is closed, QEMU has exited, and this method raises the error from
        ``make_error``.
        """
        try:
            self._send(text)
        except ConnectionError as error:
            raise self._make_error("QEMU exited") from error

    def expect(self, pattern: str, timeout: float) -> re.Match[bytes]:
        """Wait until the output matches a pattern, and return the match.

        This method discards the output up to the end of the match.
        """
        expression = re.compile(pattern.encode())
        deadline = time.monotonic() + timeout
        late = f"the console did not show {pattern!r} within {timeout:g} s"
        while not (found := expression.search(self._buffer)):
            self._receive(deadline, pattern, late)
        self._buffer = self._buffer[found.end() :]
        return found

    def command(self, line: str, timeout: float = 120.0) -> Answer:
        """Send a command to the workload and return the values in its reply."""
        with contextlib.suppress(ConnectionError):  # the wait for the reply reports the cause
            self._send(f"{line}\n")
        return self.answer(line.partition(" ")[0], timeout)

    def answer(self, word: str, timeout: float) -> Answer:
        """Wait for the reply that begins with this word, and return its values."""
        deadline = time.monotonic() + timeout
        while True:
            text = self._line(deadline, word)
            first, _, rest = text.partition(" ")
            if first == "error":
                raise self._make_error(f"the guest reported an error: {rest}")
            if first == word:
                pairs = (item.partition("=") for item in rest.split())
                return {key: _number(value) for key, _, value in pairs}

    def _line(self, deadline: float, word: str) -> str:
        while b"\n" not in self._buffer:
            self._receive(deadline, word, f"timed out while waiting for {word!r} from the guest")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return _TERMINAL.sub(b"", line).decode(errors="replace").strip()

    def _send(self, text: str) -> None:
        self._socket.setblocking(True)
        try:
            self._socket.sendall(text.encode())
        finally:
            self._socket.setblocking(False)

    def _receive(self, deadline: float, awaited: str, late: str) -> None:
        left = deadline - time.monotonic()
        ready = dict(self._poll.poll(left * 1000)) if left > 0 else {}
        if not ready:
            raise self._make_error(late)
        data = b""
        if self._socket.fileno() in ready:
            with contextlib.suppress(ConnectionError):  # QEMU was killed: same as end of file
                data = self._socket.recv(1 << 16)
        if not data:
            raise self._make_error(f"QEMU exited while the lab waited for {awaited!r}")
        self._buffer += data
        self.log += data


def _number(text: str) -> float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
