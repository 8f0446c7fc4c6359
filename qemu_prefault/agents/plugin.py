# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin agent, which uses ``qemu-prefault-plugin.so`` in QEMU.

The plugin also keeps the guest prefaulted without this process (native/plugin/vcpu.c). This module
implements the requests of the plugin's control socket, and defines the :class:`Agent` that sends
batches of ranges to the plugin. This agent does not need permission to trace QEMU.

QEMU may be hostile. Each wait for the plugin has a time limit, and :mod:`.plugin_protocol` checks
each reply. :mod:`.plugin_socket` finds the control socket and checks that QEMU listens on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import AgentError, Code, FailedError, UnsupportedError
from ..host.foreign_fds import DescriptorsError
from ..host.procfs import Process, thread_names
from .base import BatchResult, Kind, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker
from .plugin_protocol import (
    BUSY,
    MAX_BYTES,
    parse_answer,
    parse_done,
    parse_event,
    parse_progress,
    parse_status,
    sent_descriptors,
    too_long,
)
from .plugin_socket import connect, find_control_socket

__all__ = [
    "BUSY",
    "PROTOCOL",
    "Control",
    "PluginAgent",
    "batch_threads",
    "find_control_socket",
    "parse_answer",
    "plugin_path",
]

#: The protocol version of the control socket.
PROTOCOL: Final = 1
#: The name of the threads that process a batch.
BATCH_THREAD: Final = "prefault-batch"
#: Seconds to wait for a reply.
ANSWER_SECONDS: Final = 5.0
#: Seconds without progress after which a batch is aborted. The plugin itself ends a range that
#: makes no progress for half a second (STUCK_NS, native/plugin/state.h).
STALLED_SECONDS: Final = 5.0
#: The same for a batch that only populates. The guest runs meanwhile, and the kernel may have to
#: reclaim memory.
STALLED_POPULATE_SECONDS: Final = 60.0
#: Number of bytes that a batch must complete within :data:`STALLED_SECONDS`.
LEAST_PROGRESS: Final = 1 << 20
#: Seconds to wait for the end of the batch's threads after the connection was closed.
CLOSE_SECONDS: Final = 3.0


def plugin_path() -> Path:
    """Return the plugin's path for QEMU's ``-plugin`` option or ``LD_PRELOAD``.

    :raises UnsupportedError: If this installation was built without the plugin.
    """
    path = Path(__file__).resolve().parent.parent / "qemu-prefault-plugin.so"
    if not path.exists():
        raise UnsupportedError(
            f"this installation has no plugin, because {path} does not exist",
            "run pip install . in the source tree of qemu-prefault",
            code=Code.NO_PLUGIN,
        )
    return path


def batch_threads(pid: int) -> bool:
    """Return whether the plugin in process ``pid`` is processing a batch."""
    return BATCH_THREAD in thread_names(pid).values()


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
        self.send(request)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self.receive()
        except TimeoutError:
            raise FailedError(
                f"the plugin in QEMU (pid {self._pid}) did not reply within {ANSWER_SECONDS:g} s",
                "check with ps -o stat -p PID whether SIGSTOP has stopped QEMU",
                code=Code.CONTROL_SOCKET,
            ) from None

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
        stalled_seconds: float | None = None,
    ) -> tuple[list[tuple[int, int]], float]:
        """Wait for the end of a batch.

        If the batch makes no progress for a limited time, this method aborts the batch.

        :param count: The number of ranges in the batch.
        :param total: The number of bytes in the batch.
        :param stalled_seconds: The time limit in seconds, or None for :data:`STALLED_SECONDS`.
        :returns: The completed bytes and the errno of each range, and the duration of the batch in
            seconds.
        :raises AgentError: If the reply is malformed, or if the batch makes no progress.
        :raises FailedError: As for :meth:`receive`.
        """
        counted = 0
        seconds = STALLED_SECONDS if stalled_seconds is None else stalled_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                while "done" not in (answer := await self.receive()):
                    await asyncio.sleep(0)  # receive() does not suspend if a reply is buffered
                    progress = parse_progress(answer, self._pid)
                    if progress is None:
                        continue
                    on_progress(min(progress, total))
                    # A few bytes at a time are no progress, or the batch might never end.
                    if progress - counted >= LEAST_PROGRESS and counted < total:
                        counted = min(progress, total)
                        limit.reschedule(asyncio.get_running_loop().time() + seconds)
        except TimeoutError:
            self.send("abort")
            raise AgentError(
                f"the plugin in QEMU (pid {self._pid}) made no progress for {seconds:g} s",
                "check with ps -o stat -p PID whether SIGSTOP has stopped QEMU, and check whether "
                "the host is short of memory. Then run qemu-prefault again",
            ) from None
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


class PluginAgent:
    """The :class:`~qemu_prefault.agents.base.Agent` that uses the plugin's threads.

    The methods of this class raise the same errors as :class:`Control`.
    """

    name = "plugin"
    warnings: Mapping[str, str] = MappingProxyType({})
    ranges_per_batch = 4096

    def __init__(
        self,
        process: Process,
        socket: Path,
        threads: Sequence[VcpuThread],
        limits: Limits | None = None,
    ) -> None:
        self.process = process
        self.limits = limits or Limits()
        self.workers = tuple(
            Worker(index, thread.vcpu_id, thread.node) for index, thread in enumerate(threads)
        )
        self._socket = socket
        self._control: Control | None = None
        self._places: dict[int, int] = {}
        self._working = self._aborted = self._lent = False

    async def start(self) -> None:
        """See :meth:`.Agent.start`.

        :raises AgentError: If the plugin's status does not list a vCPU.
        """
        self._control = await Control.connect(self._socket, self.process)
        status = await self._control.status()
        places = {vcpu["id"]: place for place, vcpu in enumerate(status["vcpus"])}
        for worker in self.workers:
            if worker.vcpu_id is None:  # a run that only populates can use any thread
                self._places[worker.index] = worker.index % max(len(places), 1)
            elif worker.vcpu_id in places:
                self._places[worker.index] = places[worker.vcpu_id]
            else:
                raise AgentError(
                    f"the plugin in QEMU (pid {self.process.pid}) does not list vCPU "
                    f"{worker.vcpu_id}",
                    "run qemu-prefault again, because QEMU may be plugging or unplugging this vCPU",
                )

    async def hold_vcpus(self) -> bool:
        """See :meth:`.Agent.hold_vcpus`.

        The result is False if the plugin does not support the ``lend`` request.
        """
        assert self._control
        try:
            await self._control.ask("lend")
        except AgentError:
            return False
        self._lent = True
        return True

    async def release_vcpus(self) -> None:
        """Do nothing, because the plugin itself stops its work before KVM_RUN."""

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """See :meth:`.Agent.run`."""
        assert self._control
        items = [(index, item) for index, ranges in batch.items() for item in ranges]
        if self._aborted:
            return _sort(batch, items, [(0, errno.ECANCELED)] * len(items), 0.0)
        command = "work-lent" if self._lent else "work"
        request = [f"{command} {len(items)} {self.limits.chunk_bytes}"]
        request += [
            f"{self._places[index]} {int(item.kind)} {item.start} {item.size}"
            for index, item in items
        ]
        self._working = True
        try:
            self._control.send("\n".join(request))
            total = sum(item.size for _, item in items)
            populates = all(item.kind is Kind.POPULATE for _, item in items)
            limit = STALLED_POPULATE_SECONDS if populates else None
            done, seconds = await self._control.done(len(items), total, on_progress, limit)
        finally:
            self._working = False
        return _sort(batch, items, done, seconds)

    def abort(self) -> None:
        """See :meth:`.Agent.abort`."""
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        """See :meth:`.Agent.interrupt`."""
        if self._working and self._control:
            self._control.send("abort")

    def orphan_cleanup(self) -> OrphanCleanup:
        """See :meth:`.Agent.orphan_cleanup`."""
        assert self._control
        descriptor, pid = self._control.fileno(), self.process.pid
        return OrphanCleanup(
            stop_helpers=lambda: os.close(descriptor),  # the last copy, as this process was killed
            helpers_gone=lambda: not batch_threads(pid),
            timeout=self.limits.stuck + self.limits.dead_man,
        )

    async def close(self) -> None:
        """See :meth:`.Agent.close`.

        :raises AgentError: If QEMU still has threads of a batch after :data:`CLOSE_SECONDS`.
        """
        if self._control is None:
            return
        self._control.close()
        self._control = None
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                while batch_threads(self.process.pid):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AgentError(
                f"the plugin in QEMU (pid {self.process.pid}) did not end its batch within "
                f"{CLOSE_SECONDS:g} s",
                "check the guest, and report this error",
            ) from None


def _sort(
    batch: Mapping[int, Sequence[Range]],
    items: Sequence[tuple[int, Range]],
    done: Sequence[Sequence[int]],
    seconds: float,
) -> BatchResult:
    outcomes: dict[int, list[Outcome]] = {index: [] for index in batch}
    for (index, item), (size, error) in zip(items, done, strict=True):
        outcomes[index].append(Outcome(item, min(size, item.size), error))
    return BatchResult({index: tuple(found) for index, found in outcomes.items()}, seconds)
