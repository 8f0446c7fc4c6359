# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin agent, which uses ``qemu-prefault-plugin.so`` in QEMU.

The plugin also keeps the guest prefaulted without this process (native/plugin/vcpu.c). This module
finds the plugin's control socket, and implements the socket's protocol. It defines the
:class:`Agent` that sends batches of ranges to the plugin. This agent does not need permission to
trace QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import AgentError, Code, FailedError, LayoutError, RefusedError, UnsupportedError
from ..host.procfs import Process, thread_names
from ..qemu.qapi import expect_array, expect_bool, expect_int, expect_object, expect_str
from .base import MAX_ERRNO, BatchResult, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker

#: The protocol version of the control socket.
PROTOCOL: Final = 1
#: Prefix of the name of the plugin's control thread. The listening descriptor's number follows.
CONTROL_THREAD: Final = "prefault/"
#: The name of the threads that process a batch.
BATCH_THREAD: Final = "prefault-batch"
#: Seconds to wait for a reply.
ANSWER_SECONDS: Final = 10.0
#: The error code of the reply if another client's batch is running (native/plugin/errors.h).
BUSY: Final = "busy"
#: Maximum length of a reply, in bytes. The reply to a batch contains the results of all ranges.
LONGEST_LINE: Final = 64 << 20
#: Maximum length of the path of a UNIX socket, in bytes, without the terminating zero (unix(7)).
LONGEST_SOCKET_PATH: Final = 107


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


def find_control_socket(process: Process) -> Path | None:
    """Return the path of the plugin's control socket, or None if QEMU has no plugin.

    The name of the plugin's control thread contains the number of the listening socket's
    descriptor. ``/proc/PID/net/unix`` contains the path of this socket. QEMU may run in its own
    mount namespace. Therefore the result is a path below ``/proc/PID/root`` if the socket exists
    there.
    """
    proc = Path("/proc") / str(process.pid)
    for name in thread_names(process.pid).values():
        if not name.startswith(CONTROL_THREAD):
            continue
        try:
            link = os.readlink(proc / "fd" / name.removeprefix(CONTROL_THREAD))
            table = (proc / "net" / "unix").read_text(errors="surrogateescape")
        except OSError:
            continue
        bound = bound_path(table, link)
        if bound:
            inside = proc / "root" / bound.lstrip("/")
            return inside if inside.exists() else Path(bound)
    return None


def bound_path(table: str, link: str) -> str | None:
    """Return the path to which a UNIX socket is bound, or None if it is unbound.

    :param table: The text of ``/proc/PID/net/unix``.
    :param link: The target ``socket:[INODE]`` of the link in ``/proc/PID/fd``.
    """
    inode = link.removeprefix("socket:[").removesuffix("]")
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[6] == inode:
            return fields[7]
    return None


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
    async def connect(cls, path: Path, pid: int) -> Control:
        """Connect to the plugin, and check the version of the plugin's protocol.

        :param path: The path of the control socket.
        :param pid: The pid of QEMU, for error messages.
        :raises UnsupportedError: If this process has no permission to connect, or if the plugin has
            a different version.
        :raises FailedError: If the connection fails, or if the plugin does not reply.
        """
        try:
            reader, writer = await _open(path)
        except PermissionError as error:
            raise UnsupportedError(
                f"cannot connect to the plugin's control socket {path}: {error.strerror}",
                "run qemu-prefault as root, or as QEMU's user",
                code=Code.CONTROL_SOCKET,
            ) from error
        except OSError as error:
            raise FailedError(
                f"cannot connect to the plugin's control socket {path}: {error.strerror}",
                "check in QEMU's log whether QEMU has exited, or use --agent attach, which needs "
                "no plugin",
                code=Code.CONTROL_SOCKET,
            ) from error
        control = cls(reader, writer, pid)
        try:
            status = await control.ask("status")
        except BaseException:
            writer.close()
            raise
        if status.get("plugin") != PROTOCOL:  # status() expects this version's fields
            writer.close()
            raise UnsupportedError(
                f"the plugin in QEMU (pid {pid}) is from another version of qemu-prefault",
                "use the qemu-prefault release that contains this plugin, or use --agent attach",
                code=Code.PLUGIN_VERSION,
            )
        return control

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, pid: int) -> AsyncIterator[Control]:
        """Connect like :meth:`connect`, and disconnect at the end of the block."""
        control = await cls.connect(path, pid)
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
        answer = await self.ask("status")
        with self._well_formed():
            for vcpu in expect_array(answer.get("vcpus"), "vcpus"):
                expect_int(expect_object(vcpu, "an entry of vcpus").get("id"), "id of a vCPU")
            for key in ("keeping", "pre_fault_memory"):
                expect_bool(answer.get(key), key)
            expect_str(answer.get("quirk"), "quirk")
            if answer.get("held") is not None:
                expect_str(answer["held"], "held")
            answer.setdefault("held", None)
            expect_int(answer.get("pending"), "pending")
            counters = expect_object(answer.get("counters"), "counters")
            for key in ("prefaulted", "again", "errors"):
                expect_int(counters.get(key), f"counter {key}")
        return answer

    async def event(self) -> dict[str, Any]:
        """Return the next event after a ``follow`` request (docs/reference/events.md).

        :raises AgentError: If the event is malformed.
        :raises FailedError: As for :meth:`receive`.
        """
        event = await self.receive()
        with self._well_formed():
            expect_str(event.get("event"), "event")
            for key in ("gpa", "size", "bytes", "populated", "pending", "remaining"):
                if key in event:
                    expect_int(event[key], f"{key} of an event")
            for key in ("time", "seconds"):
                if key in event:
                    _expect_seconds(event[key], f"{key} of an event")
        return event

    async def done(
        self, count: int, on_progress: Callable[[int], None]
    ) -> tuple[list[tuple[int, int]], float]:
        """Wait for the end of a batch.

        :param count: The number of ranges in the batch.
        :returns: The completed bytes and the errno of each range, and the duration of the batch in
            seconds.
        :raises AgentError: If the reply is malformed.
        :raises FailedError: As for :meth:`receive`.
        """
        while "done" not in (answer := await self.receive()):
            if "progress" in answer:
                with self._well_formed():
                    progress = expect_int(answer["progress"], "progress")
                on_progress(progress)
        with self._well_formed():
            ranges = []
            for item in expect_array(answer["done"], "done"):
                size, error = (*expect_array(item, "an entry of done"), None, None)[:2]
                ranges.append(
                    (expect_int(size, "bytes done"), expect_int(error, "an errno", 0, MAX_ERRNO))
                )
            if len(ranges) != count:
                raise LayoutError(f"done has {len(ranges)} entries for {count} ranges")
            return ranges, _expect_seconds(answer.get("seconds"), "seconds")

    @contextlib.contextmanager
    def _well_formed(self) -> Iterator[None]:
        """Raise the error for a malformed reply if a check in the block fails."""
        try:
            yield
        except LayoutError as error:
            raise AgentError(
                f"the plugin in QEMU (pid {self._pid}) sent a malformed reply: {error.cause}",
                "report this error",
            ) from error

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
        except (OSError, ValueError) as error:
            raise self._gone() from error
        if not line.endswith(b"\n"):
            raise self._gone()
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AgentError(
                f"the plugin in QEMU (pid {self._pid}) sent a reply that is not JSON",
                "report this error",
            ) from error
        with self._well_formed():
            answer = dict(expect_object(found, "the reply"))
        if "error" in answer:
            if answer.get("code") == BUSY:
                raise RefusedError(
                    f"another qemu-prefault is working in QEMU (pid {self._pid})",
                    "wait until the other qemu-prefault has finished, then run qemu-prefault again",
                    code=Code.BUSY_AGENT,
                )
            raise AgentError(
                f"the plugin refused the request: {answer['error']}", "report this error"
            )
        return answer

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
        """Close the connection to the plugin."""
        self._writer.close()


async def _open(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return await asyncio.open_unix_connection(path, limit=LONGEST_LINE)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = Path(f"/proc/self/fd/{directory}") / path.name
        return await asyncio.open_unix_connection(short, limit=LONGEST_LINE)
    finally:
        os.close(directory)


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
        self._control = await Control.connect(self._socket, self.process.pid)
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
            done, seconds = await self._control.done(len(items), on_progress)
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
        """See :meth:`.Agent.close`."""
        if self._control is None:
            return
        self._control.close()
        self._control = None
        async with asyncio.timeout(self.limits.stuck + self.limits.dead_man):
            while batch_threads(self.process.pid):
                await asyncio.sleep(0.005)


def _expect_seconds(value: object, what: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1 << 35:
        return float(value)
    raise LayoutError(f"{what} is not a time")


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
