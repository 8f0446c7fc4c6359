# SPDX-License-Identifier: GPL-2.0-or-later
"""A small blocking QMP client for the lab.

The lab does not use qemu-prefault's own client (``qemu_prefault.qemu.monitor``), because the tests
must detect that client's bugs.
"""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from .errors import QmpError


class Qmp:
    """A connected QMP client, in which every wait has a deadline.

    :ivar events: Received events that :meth:`wait_event` has not returned yet.
    """

    def __init__(self, connection: socket.socket, timeout: float = 30.0) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._number = 0
        deadline = time.monotonic() + timeout
        self.greeting = self._receive(deadline)
        if "QMP" not in self.greeting:
            raise QmpError(f"expected a QMP greeting, got {self.greeting!r}")
        self.execute("qmp_capabilities")

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def execute(self, command: str, timeout: float = 60.0, **arguments: Any) -> Any:
        """Run a command and return its result.

        :raises QmpError: If QEMU returned an error, or did not reply before the timeout.
        """
        self._number += 1
        message: dict[str, Any] = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        deadline = time.monotonic() + timeout
        self._send(json.dumps(message).encode() + b"\n", deadline, command)
        return self._answer(command, deadline)

    def send_fd(self, name: str, fd: int) -> None:
        """Pass a file descriptor to QEMU under a name (``getfd``), for ``fd:NAME``."""
        self._number += 1
        message = {"execute": "getfd", "id": self._number, "arguments": {"fdname": name}}
        socket.send_fds(self.connection, [json.dumps(message).encode() + b"\n"], [fd])
        self._answer("getfd", time.monotonic() + 60.0)

    def wait_event(self, *names: str, timeout: float = 60.0) -> dict[str, Any]:
        """Wait for an event with one of these names, and return it.

        If such events have arrived already, return the first one.
        """
        deadline = time.monotonic() + timeout
        while True:
            for index, event in enumerate(self.events):
                if event["event"] in names:
                    return self.events.pop(index)
            answer = self._receive(deadline, " or ".join(names))
            if "event" in answer:
                self.events.append(answer)

    def _answer(self, command: str, deadline: float) -> Any:
        while True:
            answer = self._receive(deadline, command)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id") == self._number:
                if "error" in answer:
                    raise QmpError(f"QMP {command}: {answer['error']['desc']}")
                return answer["return"]

    def _send(self, data: bytes, deadline: float, what: str) -> None:
        while data:
            self._wait(select.POLLOUT, deadline, what)
            try:
                data = data[self.connection.send(data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise QmpError(f"QMP connection lost while sending {what}: {error}") from error

    def _receive(self, deadline: float, what: str = "the greeting") -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait(select.POLLIN, deadline, what)
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError as error:
                raise QmpError(f"QMP connection lost while waiting for {what}") from error
            if not data:
                raise QmpError(f"QMP connection closed while waiting for {what}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _wait(self, mask: int, deadline: float, what: str) -> None:
        poll = select.poll()
        poll.register(self.connection, mask)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise QmpError(f"timed out while waiting for QMP ({what})")
