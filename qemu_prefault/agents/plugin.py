# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin agent, which uses ``qemu-prefault-plugin.so`` in QEMU.

The plugin also keeps the guest prefaulted without this process (native/plugin/vcpu.c). This module
defines the :class:`Agent` that sends batches of ranges to the plugin. The agent does not need
permission to trace QEMU. :mod:`.plugin_control` implements the requests of the control socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..errors import AgentError, Code, UnsupportedError
from ..host.procfs import Process, thread_names
from ..host.stall import IdleThreads, ProgressLimit
from .base import BatchResult, Kind, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker
from .plugin_control import PROTOCOL, Control
from .plugin_protocol import BUSY, parse_answer
from .plugin_socket import find_control_socket

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

#: The name of the threads that process a batch.
BATCH_THREAD: Final = "prefault-batch"
#: Seconds without progress after which a batch that only populates is aborted. The guest runs
#: meanwhile, and the kernel may have to reclaim memory. If the batch's threads are idle, the batch
#: is aborted earlier (:class:`.IdleThreads`).
STALLED_POPULATE_SECONDS: Final = 60.0
#: Seconds to wait for the end of the batch's threads after the connection was closed.
CLOSE_SECONDS: Final = 3.0
#: The same if the batch made no progress, so that a run ends within 10 s.
CLOSE_STALLED_SECONDS: Final = 1.0


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


def batch_threads(pid: int) -> list[int]:
    """Return the ids of the threads with which the plugin in process ``pid`` processes a batch."""
    return [tid for tid, name in thread_names(pid).items() if name == BATCH_THREAD]


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
        #: False if the plugin has prefault vCPUs (native/plugin/prefault_vcpu.h).
        self.needs_pause = True
        self._close_seconds = CLOSE_SECONDS

    async def start(self) -> None:
        """See :meth:`.Agent.start`.

        :raises AgentError: If the plugin's status does not list a vCPU.
        """
        self._control = await Control.connect(self._socket, self.process)
        status = await self._control.status()
        self.needs_pause = not status["prefault_vcpus"]
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
        command = "work-lent" if self._lent or not self.needs_pause else "work"
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
            limit = self._populate_limit(total) if populates else None
            done, seconds = await self._control.done(len(items), total, on_progress, limit)
        except AgentError:
            self._close_seconds = CLOSE_STALLED_SECONDS
            raise
        finally:
            self._working = False
        return _sort(batch, items, done, seconds)

    def _populate_limit(self, total: int) -> ProgressLimit:
        pid = self.process.pid
        idle = IdleThreads(self.process, lambda: batch_threads(pid), faults_only=True)
        return ProgressLimit(total, STALLED_POPULATE_SECONDS, idle)

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

        :raises AgentError: If QEMU still has threads of a batch after the time limit.
        """
        if self._control is None:
            return
        self._control.close()
        self._control = None
        try:
            async with asyncio.timeout(self._close_seconds):
                while batch_threads(self.process.pid):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AgentError(
                f"the plugin in QEMU (pid {self.process.pid}) did not end its batch within "
                f"{self._close_seconds:g} s",
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
