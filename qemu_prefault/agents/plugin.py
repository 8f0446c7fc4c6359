# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin agent: ``qemu-prefault-plugin.so`` was loaded into QEMU when it started.

It keeps the guest prefaulted by itself (native/plugin/vcpu.c). This is its other side: how it is
found from outside, what its control socket answers, and the :class:`Agent` that hands it
batches of work. Nothing is injected, so no right to trace QEMU is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import AgentError, Code, FailedError, RefusedError, UnsupportedError
from ..host.procfs import Process, thread_names
from .base import BatchResult, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker

PROTOCOL: Final = 1
CONTROL_THREAD: Final = "prefault/"
"""How the plugin's control thread is called; the listening socket's descriptor follows."""
BATCH_THREAD: Final = "prefault-batch"
ANSWER_SECONDS: Final = 10.0
BUSY: Final = "busy"
"""The code of an error answer (native/plugin/errors.h): another client's batch is at work."""
LONGEST_LINE: Final = 64 << 20  # an answer tells of every range of a batch
LONGEST_SOCKET_PATH: Final = 107  # struct sockaddr_un


def plugin_path() -> Path:
    """Where ``qemu-prefault-plugin.so`` is, for QEMU's ``-plugin`` or ``LD_PRELOAD``.

    :raise UnsupportedError: this installation was built without it.
    """
    path = Path(__file__).resolve().parent.parent / "qemu-prefault-plugin.so"
    if not path.exists():
        raise UnsupportedError(
            f"this installation has no plugin: {path} does not exist",
            "install it from the source tree: pip install .",
            code=Code.NO_PLUGIN,
        )
    return path


# -- finding it --------------------------------------------------------------------------


def find_control_socket(process: Process) -> Path | None:
    """The control socket of the plugin in that QEMU, as a path we can open; None: no plugin.

    The plugin's thread tells which descriptor it listens on, and the kernel which path that
    is bound to. The path is seen through ``/proc/PID/root``: QEMU may have its own mounts.
    """
    proc = Path("/proc") / str(process.pid)
    for name in thread_names(process.pid).values():
        if not name.startswith(CONTROL_THREAD):
            continue
        try:
            link = os.readlink(proc / "fd" / name.removeprefix(CONTROL_THREAD))
            table = (proc / "net" / "unix").read_text()
        except OSError:
            continue
        bound = bound_path(table, link)
        if bound:
            inside = proc / "root" / bound.lstrip("/")
            return inside if inside.exists() else Path(bound)
    return None


def bound_path(table: str, link: str) -> str | None:
    """The path of ``socket:[INODE]`` in the text of ``/proc/net/unix``."""
    inode = link.removeprefix("socket:[").removesuffix("]")
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[6] == inode:
            return fields[7]
    return None


def batch_threads(pid: int) -> bool:
    """Whether threads of a batch are at work in process ``pid``."""
    return BATCH_THREAD in thread_names(pid).values()


# -- talking to it -----------------------------------------------------------------------


class Control:
    """A connection to the plugin's control socket. Use :meth:`open`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._pid = pid

    @classmethod
    async def connect(cls, path: Path, pid: int) -> Control:
        """Connect, and check that both sides speak the same protocol.

        :raise UnsupportedError: not permitted, or another version of the plugin.
        :raise FailedError: nobody listens there.
        """
        try:
            reader, writer = await _open(path)
        except PermissionError as error:
            raise UnsupportedError(
                f"the plugin's control socket {path} may not be opened: {error.strerror}",
                "run this as root, or as QEMU's user",
                code=Code.CONTROL_SOCKET,
            ) from error
        except OSError as error:
            raise FailedError(
                f"the plugin's control socket {path} does not answer: {error.strerror}",
                "did QEMU just exit? Its log tells; --agent attach does without the plugin",
                code=Code.CONTROL_SOCKET,
            ) from error
        control = cls(reader, writer, pid)
        try:
            status = await control.ask("status")
        except BaseException:
            writer.close()
            raise
        if status.get("plugin") != PROTOCOL:
            writer.close()
            raise UnsupportedError(
                f"the plugin in QEMU (pid {pid}) is of another version",
                "use the qemu-prefault it came with, or --agent attach",
                code=Code.PLUGIN_VERSION,
            )
        return control

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, pid: int) -> AsyncIterator[Control]:
        """:meth:`connect`, and close at the end of the block."""
        control = await cls.connect(path, pid)
        try:
            yield control
        finally:
            control.close()

    async def ask(self, request: str) -> dict[str, Any]:
        """Send a request, get its answer.

        :raise FailedError: the plugin refused it, or is gone.
        """
        self.send(request)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self.receive()
        except TimeoutError:
            raise FailedError(
                f"the plugin in QEMU (pid {self._pid}) does not answer",
                "is QEMU stopped (SIGSTOP)? See: ps -o stat -p PID",
                code=Code.CONTROL_SOCKET,
            ) from None

    def send(self, text: str) -> None:
        self._writer.write(text.encode() + b"\n")

    async def receive(self) -> dict[str, Any]:
        """The next line; ``{"error": …}`` is raised."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError) as error:
            raise self._gone() from error
        if not line.endswith(b"\n"):
            raise self._gone()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise AgentError(
                f"the plugin in QEMU (pid {self._pid}) answered with something else than JSON",
                "report this",
            ) from error
        if "error" in answer:
            if answer.get("code") == BUSY:
                raise RefusedError(
                    f"another qemu-prefault is at work in QEMU (pid {self._pid})",
                    "wait until it is done, then run this again",
                    code=Code.BUSY_AGENT,
                )
            raise AgentError(f"the plugin refused: {answer['error']}", "report this")
        return answer

    def _gone(self) -> FailedError:
        return FailedError(
            f"QEMU (pid {self._pid}) closed the plugin's control socket",
            "see QEMU's own log: it has exited, or this user is not welcome (root, or QEMU's own)",
            code=Code.QEMU_GONE,
        )

    def fileno(self) -> int:
        """The socket's descriptor: whoever holds it open keeps a batch going."""
        return int(self._writer.get_extra_info("socket").fileno())

    def close(self) -> None:
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


# -- working through it ------------------------------------------------------------------


class PluginAgent:
    """Batches by the plugin's threads; see :class:`~qemu_prefault.agents.base.Agent`.

    :raise FailedError, UnsupportedError, RefusedError: see :class:`Control`.
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
        self._working = self._aborted = False

    async def start(self) -> None:
        self._control = await Control.connect(self._socket, self.process.pid)
        status = await self._control.ask("status")
        places = {vcpu["id"]: place for place, vcpu in enumerate(status["vcpus"])}
        for worker in self.workers:
            if worker.vcpu_id is None:  # populating: any of them
                self._places[worker.index] = worker.index % max(len(places), 1)
            elif worker.vcpu_id in places:
                self._places[worker.index] = places[worker.vcpu_id]
            else:
                raise AgentError(
                    f"the plugin in QEMU (pid {self.process.pid}) does not know vCPU "
                    f"{worker.vcpu_id}",
                    "it may just be plugged or unplugged: try again",
                )

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        assert self._control
        items = [(index, item) for index, ranges in batch.items() for item in ranges]
        if self._aborted:
            return _sort(batch, items, [(0, errno.ECANCELED)] * len(items), 0.0)
        request = [f"work {len(items)} {self.limits.chunk_bytes}"]
        request += [
            f"{self._places[index]} {int(item.kind)} {item.start} {item.size}"
            for index, item in items
        ]
        self._working = True
        try:
            self._control.send("\n".join(request))
            while "done" not in (answer := await self._control.receive()):
                if "progress" in answer:
                    on_progress(answer["progress"])
        finally:
            self._working = False
        return _sort(batch, items, answer["done"], answer["seconds"])

    def abort(self) -> None:
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        if self._working and self._control:
            self._control.send("abort")

    def orphan_cleanup(self) -> OrphanCleanup:
        assert self._control
        descriptor, pid = self._control.fileno(), self.process.pid
        return OrphanCleanup(
            stop_helpers=lambda: os.close(descriptor),  # ours was the last copy
            helpers_gone=lambda: not batch_threads(pid),
            timeout=self.limits.stuck + self.limits.dead_man,
        )

    async def close(self) -> None:
        if self._control is None:
            return
        self._control.close()
        self._control = None
        async with asyncio.timeout(self.limits.stuck + self.limits.dead_man):
            while batch_threads(self.process.pid):
                await asyncio.sleep(0.005)


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
