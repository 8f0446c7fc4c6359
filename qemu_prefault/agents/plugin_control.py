# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the plugin's control socket.

QEMU may be hostile. Each wait for the plugin has a time limit, and :mod:`.plugin_protocol` checks
each reply. :mod:`.plugin_socket` finds the control socket and checks that QEMU listens on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from ..errors import AgentError, Code, FailedError, UnsupportedError
from ..host.foreign_fds import DescriptorsError
from ..host.procfs import Process
from ..host.stall import ProgressLimit
from .plugin_protocol import (
    MAX_BYTES,
    parse_answer,
    parse_done,
    parse_event,
    parse_progress,
    parse_status,
    sent_descriptors,
    too_long,
)
from .plugin_socket import connect

#: The protocol version of the control socket.
PROTOCOL: Final = 1
#: Seconds to wait for a reply, or for several replies if this process sends a request immediately
#: after each reply.
ANSWER_SECONDS: Final = 5.0
#: Seconds to wait for a further reply after :data:`ANSWER_SECONDS`.
LATE_ANSWER_SECONDS: Final = 0.5
#: Seconds without progress after which a batch is aborted. The plugin itself ends a range that
#: makes no progress for half a second (STUCK_NS, native/plugin/state.h).
STALLED_SECONDS: Final = 5.0
#: Seconds between two checks of the progress.
CHECK_SECONDS: Final = 0.25


class Control:
    """A connection to the plugin's control socket.

    :meth:`connect` and :meth:`open` create the connection.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._pid = pid
        self._patience = ANSWER_SECONDS
        self._answered_at = time.monotonic()

    @classmethod
    async def connect(cls, path: Path, process: Process | int) -> Control:
        """Connect to the plugin, and check the version of the plugin's protocol.

        :param path: The path of the control socket in QEMU's root directory.
        :param process: QEMU, or its pid.
        :raises UnsupportedError: If this process has no permission to connect, or if the plugin has
            a different version.
        :raises FailedError: If the connection fails, if another process than QEMU listens on the
            socket, or if the plugin does not reply.
        :raises AgentError: If the reply is malformed.
        """
        if isinstance(process, int):
            process = Process.find(process)
        client = await _connect_within(path, process, ANSWER_SECONDS)
        reader, writer = await asyncio.open_unix_connection(sock=client, limit=MAX_BYTES)
        control = cls(reader, writer, process.pid)
        try:
            status = await control.ask("status")
        except BaseException:
            writer.close()
            raise
        if status.get("plugin") != PROTOCOL:  # status() expects this version's fields
            writer.close()
            raise UnsupportedError(
                f"the plugin in QEMU (pid {process.pid}) is from another version of qemu-prefault",
                "use the qemu-prefault release that contains this plugin, or use --agent attach",
                code=Code.PLUGIN_VERSION,
            )
        return control

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, process: Process | int) -> AsyncIterator[Control]:
        """Connect like :meth:`connect`, and disconnect at the end of the block."""
        control = await cls.connect(path, process)
        try:
            yield control
        finally:
            control.close()

    async def ask(self, request: str) -> dict[str, Any]:
        """Send a request, and return the plugin's reply.

        :raises FailedError: If the plugin refuses the request, if the plugin does not reply, or if
            QEMU has exited.
        :raises RefusedError: If the plugin is processing another client's batch.
        """
        asked_at = time.monotonic()
        self._patience = min(ANSWER_SECONDS, self._patience + asked_at - self._answered_at)
        seconds = max(self._patience, LATE_ANSWER_SECONDS)
        self.send(request)
        try:
            async with asyncio.timeout(seconds):
                return await self.receive()
        except TimeoutError:
            raise FailedError(
                f"the plugin in QEMU (pid {self._pid}) did not reply within {seconds:.1f} s",
                "check with ps -o stat -p PID whether SIGSTOP has stopped QEMU",
                code=Code.CONTROL_SOCKET,
            ) from None
        finally:
            self._answered_at = time.monotonic()
            self._patience -= self._answered_at - asked_at

    async def status(self) -> dict[str, Any]:
        """Return the plugin's status.

        :raises AgentError: If a field that this package uses is absent or has another type.
        :raises FailedError: As for :meth:`ask`.
        """
        return parse_status(await self.ask("status"), self._pid)

    async def event(self) -> dict[str, Any]:
        """Return the next event after a ``follow`` request (docs/reference/events.md).

        This method has no time limit, because the plugin sends an event only when something
        happens.

        :raises AgentError: If the event is malformed.
        :raises FailedError: As for :meth:`receive`.
        """
        return parse_event(await self.receive(), self._pid)

    async def done(
        self,
        count: int,
        total: int,
        on_progress: Callable[[int], None],
        limit: ProgressLimit | None = None,
    ) -> tuple[list[tuple[int, int]], float]:
        """Wait for the end of a batch.

        If the batch makes no progress for a limited time, this method aborts the batch.

        :param count: The number of ranges in the batch.
        :param total: The number of bytes in the batch.
        :param limit: The limit, or None for :data:`STALLED_SECONDS`.
        :returns: The completed bytes and the errno of each range, and the duration of the batch in
            seconds.
        :raises AgentError: If the reply is malformed, or if the batch makes no progress.
        :raises FailedError: As for :meth:`receive`.
        """
        limit = limit or ProgressLimit(total, STALLED_SECONDS)
        completed = 0
        while True:
            answer: dict[str, Any] = {}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    answer = await self.receive()
            if "done" in answer:
                break
            await asyncio.sleep(0)  # receive() does not suspend if a reply is buffered
            progress = parse_progress(answer, self._pid)
            if progress is not None:
                completed = min(progress, total)
                on_progress(completed)
            if (seconds := limit.exceeded(completed)) is not None:
                self.send("abort")
                raise AgentError(
                    f"the plugin in QEMU (pid {self._pid}) made no progress for {seconds:.1f} s",
                    "check with ps -o stat -p PID whether SIGSTOP has stopped QEMU, and check "
                    "whether the host is short of memory. Then run qemu-prefault again",
                )
        return parse_done(answer, count, self._pid)

    def send(self, text: str) -> None:
        """Send a request without waiting for a reply."""
        self._writer.write(text.encode() + b"\n")

    async def receive(self) -> dict[str, Any]:
        """Return the plugin's next reply.

        :raises RefusedError: If the reply is an error with the code ``busy``.
        :raises AgentError: If the reply is another error, or is malformed.
        :raises FailedError: If QEMU has closed the connection.
        """
        try:
            line = await self._reader.readline()
        except ValueError as error:  # the line exceeds the limit of the reader
            raise too_long(self._pid) from error
        except DescriptorsError as error:
            raise sent_descriptors(self._pid) from error
        except OSError as error:
            raise self._gone() from error
        if not line.endswith(b"\n"):
            raise self._gone()
        return parse_answer(line, self._pid)

    def _gone(self) -> FailedError:
        return FailedError(
            f"QEMU (pid {self._pid}) closed the plugin's control socket",
            "check in QEMU's log whether QEMU has exited, and run qemu-prefault as root or as "
            "QEMU's user",
            code=Code.QEMU_GONE,
        )

    def fileno(self) -> int:
        """Return the socket's descriptor.

        The plugin ends the current batch when all copies of the descriptor are closed.
        """
        return int(self._writer.get_extra_info("socket").fileno())

    def close(self) -> None:
        """Close the connection to the plugin, and discard unsent requests."""
        self._writer.transport.abort()


async def _connect_within(path: Path, process: Process, seconds: float) -> socket.socket:
    try:
        async with asyncio.timeout(seconds):
            while (client := connect(path, process)) is None:
                await asyncio.sleep(0.02)
            return client
    except TimeoutError:
        raise FailedError(
            f"the plugin in QEMU (pid {process.pid}) did not accept a connection within "
            f"{seconds:g} s",
            "check with ps -o stat -p PID whether SIGSTOP has stopped QEMU",
            code=Code.CONTROL_SOCKET,
        ) from None
