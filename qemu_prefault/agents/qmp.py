# SPDX-License-Identifier: GPL-2.0-or-later
"""The qmp agent: a QEMU that has ``x-kvm-prefault-memory`` does the work by itself.

See patches/qemu and docs/patched-qemu.md. A batch is one job of QEMU's; its ranges are pinned to
the vCPUs that are to do them, so that each one's outcome is told. QEMU is not traced, and no
thread of ours is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import AgentError, Code, CommandError, FailedError, RefusedError
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import EventStream, Monitor
from ..qemu.queries import MIGRATION_OVER, read_migration, read_status
from .base import BatchResult, Kind, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker

COMMAND: Final = "x-kvm-prefault-memory"
QUERY: Final = "x-query-kvm-prefault"
JOB_PREFIX: Final = "qemu-prefault-"
PROGRESS_SECONDS: Final = 0.25
END_SECONDS: Final = 10.0
"""How long a job that was cancelled is waited for: chunks in hand take milliseconds."""
JOB_TYPE: Final = "kvm-prefault"
OVER: Final = ("concluded", "null")
_NUMBERS: Final = itertools.count()


async def offers_command(monitor: Monitor) -> bool:
    """Whether this QEMU has the command. Under TCG it has, and would refuse."""
    try:
        await monitor.execute(QUERY)
    except CommandError:
        return False
    return True


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def is_orphan(job: str) -> bool:
    """Whether a job was begun by one of us that is dead.

    Of a process in another PID namespace nothing is known.
    """
    namespace, _, rest = job.removeprefix(JOB_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if not job.startswith(JOB_PREFIX) or namespace != str(_pid_namespace()) or not pid.isdigit():
        return False
    return not Path("/proc", pid).exists()


class QmpAgent:
    """Batches as jobs of a patched QEMU; see :class:`~qemu_prefault.agents.base.Agent`."""

    name = "qmp"
    warnings: Mapping[str, str] = MappingProxyType({})
    ranges_per_batch = 4096

    def __init__(
        self,
        monitor: Monitor,
        sections: Callable[[], Sequence[MemorySection]],
        threads: Sequence[VcpuThread],
        limits: Limits | None = None,
    ) -> None:
        """
        :param sections: gives the guest's memory as it was last asked for. QEMU's job knows
            memory by where the guest sees it, ranges to be populated by where QEMU has it.
        """
        self.limits = limits or Limits()
        self.workers = tuple(
            Worker(index, thread.vcpu_id, thread.node) for index, thread in enumerate(threads)
        )
        self._monitor = monitor
        self._sections = sections
        self._cpus = [thread.index for thread in threads]
        self._job: str | None = None
        self._aborted = False
        self._cancelling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Cancel and dismiss the jobs of those who died before they could."""
        jobs: Any = await self._monitor.execute("query-jobs")
        for job in jobs:
            if is_orphan(job["id"]):
                if job["status"] not in OVER:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(END_SECONDS):
                            await self._end(job["id"])
                await self._dismiss(job["id"])

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        started = time.monotonic()
        outcomes: dict[int, list[Outcome]] = {index: [] for index in batch}
        done = 0
        for kind in Kind:
            items = [
                (i, item) for i, ranges in batch.items() for item in ranges if item.kind is kind
            ]
            if not items:
                continue

            def progress(more: int, base: int = done) -> None:
                on_progress(base + more)

            found = await self._run_job(kind, items, progress)
            for (index, _), outcome in zip(items, found, strict=True):
                outcomes[index].append(outcome)
                done += outcome.done
        seconds = time.monotonic() - started
        return BatchResult({index: tuple(told) for index, told in outcomes.items()}, seconds)

    async def _run_job(
        self,
        kind: Kind,
        items: Sequence[tuple[int, Range]],
        on_progress: Callable[[int], None],
    ) -> list[Outcome]:
        if self._aborted:
            return [Outcome(item, 0, errno.ECANCELED) for _, item in items]
        job = f"{JOB_PREFIX}{_pid_namespace()}-{os.getpid()}-{next(_NUMBERS)}"
        arguments = {
            "job-id": job,
            "populate": "all" if kind is Kind.POPULATE else "none",
            "map": kind is Kind.STAGE2,
            "chunk-size": self.limits.chunk_bytes,
            "ranges": [
                {
                    "start": item.start if kind is Kind.STAGE2 else self._gpa(item),
                    "size": item.size,
                    "cpu-index": self._cpus[index],
                }
                for index, item in items
            ],
        }
        with self._monitor.events("JOB_STATUS_CHANGE") as events:
            try:
                await self._monitor.execute_raw(COMMAND, arguments)
            except CommandError as error:
                raise await self._explain(error) from error
            self._job = job
            try:
                if self._aborted:  # while the command was under way
                    self.interrupt()
                await self._wait(job, events, on_progress)
            except BaseException:
                with contextlib.suppress(Exception):
                    await self._cancel(job)
                raise
            finally:
                self._job = None
        answer: Any = await self._monitor.execute_raw(QUERY, {"job-id": job})
        await self._dismiss(job)
        return _match([item for _, item in items], answer["ranges"], kind)

    async def _explain(self, error: CommandError) -> FailedError | RefusedError:
        """Why QEMU refused a job: its errors have no codes, but its state can be asked for."""
        jobs: Any = await self._monitor.execute("query-jobs")
        if any(job["type"] == JOB_TYPE and job["status"] not in OVER for job in jobs):
            return RefusedError(
                "another client has QEMU prefault memory",
                "wait until its job is over (query-jobs), or cancel it (job-cancel)",
                code=Code.BUSY_AGENT,
            )
        if await self._logs_dirty_pages():
            return RefusedError(
                error.cause,
                "wait until the migration or the measurement is over",
                code=Code.DIRTY_LOGGING,
            )
        return AgentError(error.cause, "report this")

    async def _logs_dirty_pages(self) -> bool:
        """Whether a migration, an incoming one too, or a dirty-rate measurement is under way."""
        if await read_migration(self._monitor) not in MIGRATION_OVER:
            return True
        if await read_status(self._monitor) == "inmigrate":
            return True
        for query in ("query-dirty-rate", "query-vcpu-dirty-limit"):
            with contextlib.suppress(CommandError):
                answer = await self._monitor.execute(query)
                measuring = isinstance(answer, dict) and answer.get("status") == "measuring"
                if measuring or (isinstance(answer, list) and answer):
                    return True
        return False

    async def _wait(
        self, job: str, events: EventStream, on_progress: Callable[[int], None]
    ) -> None:
        """Until the job is over; QEMU sends an event then."""
        while True:
            try:
                event = await events.get(PROGRESS_SECONDS)
            except TimeoutError:
                jobs: Any = await self._monitor.execute("query-jobs")
                mine = next((found for found in jobs if found["id"] == job), None)
                if mine is None:
                    raise AgentError(
                        f"QEMU's job {job} is gone",
                        "somebody else dismissed it (job-dismiss); run this again",
                    ) from None
                on_progress(mine["current-progress"])
                if mine["status"] in OVER:
                    return
                continue
            if event is None:
                raise FailedError(
                    "QEMU closed the QMP connection during its prefault job",
                    "see whether QEMU is still running",
                    code=Code.MONITOR_CLOSED,
                )
            if event.data.get("id") == job and event.data.get("status") in OVER:
                return

    def _gpa(self, item: Range) -> int:
        """Where the guest sees a range of QEMU's memory."""
        for section in self._sections():
            if section.hva and section.hva <= item.start < section.hva + section.size:
                return section.gpa + (item.start - section.hva)
        raise AgentError(
            f"QEMU's memory at {item.start:#x} is not the guest's any more",
            "memory was unplugged meanwhile: run this again",
        )

    async def _end(self, job: str) -> None:
        with self._monitor.events("JOB_STATUS_CHANGE") as events:
            await self._cancel(job)
            await self._wait(job, events, lambda _: None)

    async def _dismiss(self, job: str) -> None:
        with contextlib.suppress(CommandError):  # somebody was faster
            await self._monitor.execute("job-dismiss", id=job)

    async def _cancel(self, job: str) -> None:
        with contextlib.suppress(CommandError):  # it is over
            await self._monitor.execute("job-cancel", id=job)

    def abort(self) -> None:
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        if self._job is not None and self._monitor.alive:
            task = asyncio.get_running_loop().create_task(self._cancel(self._job))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    def orphan_cleanup(self) -> OrphanCleanup:
        """None: QEMU's job ends by itself, and keeps no vCPU from the guest for long.

        The next run cancels it if it has not.
        """
        return OrphanCleanup(stop_helpers=lambda: None, helpers_gone=lambda: True, timeout=0.0)

    async def close(self) -> None:
        await asyncio.gather(*self._cancelling, return_exceptions=True)


def _match(items: Sequence[Range], told: Sequence[Mapping[str, Any]], kind: Kind) -> list[Outcome]:
    """Outcomes of ranges: QEMU tells of each in order, of one piece or several."""
    pieces = iter(told)
    outcomes = []
    for item in items:
        size = done = error = 0
        while size < item.size:
            piece = next(pieces)
            size += piece["size"]
            if not error:  # what comes after an error does not count: bytes from the start
                done += piece["mapped" if kind is Kind.STAGE2 else "populated"] + piece["absent"]
                error = piece.get("error-number", 0)
        outcomes.append(Outcome(item, min(done, item.size), error))
    return outcomes
