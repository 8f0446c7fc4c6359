# SPDX-License-Identifier: GPL-2.0-or-later
"""The qmp agent, which uses a QMP command of a patched QEMU.

patches/qemu adds the ``x-kvm-prefault-memory`` command, which docs/usage/patched-qemu.md describes.
The agent converts all ranges of one kind in a batch into one QEMU job, and specifies a vCPU for
each range. QEMU reports the outcome of each range. The agent does not trace QEMU, and starts no
helper thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..errors import AgentError, Code, CommandError, FailedError, RefusedError
from ..host.procfs import Process, thread_names
from ..host.stall import IdleThreads, ProgressLimit
from ..qemu.events import EventStream
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import Monitor
from ..qemu.qapi import expect_array, expect_int, expect_object, expect_str
from ..qemu.queries import MIGRATION_OVER, read_migration, read_status
from .base import (
    MAX_ERRNO,
    BatchResult,
    Kind,
    Limits,
    OrphanCleanup,
    Outcome,
    Range,
    VcpuThread,
    Worker,
)

COMMAND: Final = "x-kvm-prefault-memory"
QUERY: Final = "x-query-kvm-prefault"
#: Prefix of a job's id. This process's pid namespace, its pid and a number follow.
JOB_PREFIX: Final = "qemu-prefault-"
#: Seconds between two progress reports.
PROGRESS_SECONDS: Final = 0.25
#: Seconds without progress after which a job is cancelled, by the kind of its work. QEMU itself
#: ends a range that no vCPU can process for 5 s (PREFAULT_REFUSED_NS in patches/qemu). While QEMU
#: populates, the kernel may have to reclaim memory. If QEMU's threads for the job are idle, the
#: job is cancelled earlier (:class:`.IdleThreads`).
NO_PROGRESS_SECONDS: Final = {Kind.STAGE2: 7.0, Kind.POPULATE: 60.0}
#: Seconds to wait for the end of cancelled jobs. A job first completes its current chunks, which
#: takes milliseconds.
END_SECONDS: Final = 5.0
JOB_TYPE: Final = "kvm-prefault"
#: The states of a job that has ended.
OVER: Final = ("concluded", "null")
_NUMBERS: Final = itertools.count()


async def offers_command(monitor: Monitor) -> bool:
    """Return whether QEMU has the ``x-kvm-prefault-memory`` command.

    Under TCG, QEMU has the command, but refuses to execute it.
    """
    try:
        await monitor.execute(QUERY)
    except CommandError:
        return False
    return True


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def is_orphan(job: str) -> bool:
    """Return whether a job belongs to a qemu-prefault process that has exited.

    If the process ran in another pid namespace, the result is False, because this process cannot
    check whether that process exists.

    :param job: The id of the job.
    """
    namespace, _, rest = job.removeprefix(JOB_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if not job.startswith(JOB_PREFIX) or namespace != str(_pid_namespace()) or not pid.isdigit():
        return False
    return not Path("/proc", pid).exists()


def busy_error() -> RefusedError:
    """Return the error for a QEMU that already processes a job."""
    return RefusedError(
        "QEMU is prefaulting memory for another client",
        "wait until QEMU's prefault job has ended (query-jobs), or cancel the job (job-cancel)",
        code=Code.BUSY_AGENT,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """A QEMU job (``query-jobs``)."""

    id: str
    type: str
    status: str
    progress: int


async def _read_jobs(monitor: Monitor) -> list[Job]:
    jobs = []
    for item in expect_array(await monitor.execute("query-jobs"), "query-jobs"):
        entry = expect_object(item, "an entry of query-jobs")
        id_, type_, status = (
            expect_str(entry.get(key), f"{key} of query-jobs") for key in ("id", "type", "status")
        )
        progress = expect_int(entry.get("current-progress"), "current-progress of query-jobs")
        jobs.append(Job(id_, type_, status, progress))
    return jobs


class QmpAgent:
    """The :class:`.Agent` that processes each batch with QEMU jobs."""

    name = "qmp"
    needs_pause = True
    warnings: Mapping[str, str] = MappingProxyType({})
    ranges_per_batch = 4096

    def __init__(
        self,
        process: Process,
        monitor: Monitor,
        sections: Callable[[], Sequence[MemorySection]],
        threads: Sequence[VcpuThread],
        limits: Limits | None = None,
    ) -> None:
        """Store the arguments without accessing QEMU.

        :param sections: A function that returns the guest's memory sections from the last query.
            QEMU's command requires guest-physical addresses. The agent uses the sections to convert
            the host virtual addresses of ranges.
        """
        self.limits = limits or Limits()
        self.workers = tuple(
            Worker(index, thread.vcpu_id, thread.node) for index, thread in enumerate(threads)
        )
        self._process = process
        self._monitor = monitor
        self._sections = sections
        self._cpus = [thread.index for thread in threads]
        self._job: str | None = None
        self._aborted = False
        self._cancelling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Cancel and dismiss the jobs of qemu-prefault processes that were killed."""
        try:
            async with asyncio.timeout(END_SECONDS):
                for job in await _read_jobs(self._monitor):
                    if is_orphan(job.id):
                        if job.status not in OVER:
                            await self._end(job.id)
                        await self._dismiss(job.id)
        except TimeoutError:
            raise busy_error() from None

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """See :meth:`.Agent.run`."""
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
        return BatchResult({index: tuple(done) for index, done in outcomes.items()}, seconds)

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
        limit = self._progress_limit(kind, sum(item.size for _, item in items))
        with self._monitor.events("JOB_STATUS_CHANGE") as events:
            try:
                await self._monitor.execute_raw(COMMAND, arguments)
            except CommandError as error:
                raise await self._explain(error) from error
            self._job = job
            try:
                if self._aborted:  # abort() was called during the command above
                    self.interrupt()
                await self._wait(job, events, on_progress, limit)
            except BaseException:
                with contextlib.suppress(Exception):
                    await self._cancel(job)
                raise
            finally:
                self._job = None
        answer = expect_object(await self._monitor.execute_raw(QUERY, {"job-id": job}), QUERY)
        await self._dismiss(job)
        reported = expect_array(answer.get("ranges"), f"ranges of {QUERY}")
        return _match([item for _, item in items], reported, kind)

    async def _explain(self, error: CommandError) -> FailedError | RefusedError:
        """Return an error for a job that QEMU refused.

        QEMU's errors have no codes. Therefore this method derives the reason from QEMU's state.
        """
        jobs = await _read_jobs(self._monitor)
        if any(job.type == JOB_TYPE and job.status not in OVER for job in jobs):
            return busy_error()
        if await self._logs_dirty_pages():
            return RefusedError(
                error.cause,
                "wait until the migration or the dirty-rate measurement has ended",
                code=Code.DIRTY_LOGGING,
            )
        return AgentError(error.cause, "report this error")

    async def _logs_dirty_pages(self) -> bool:
        """Return whether a migration or a dirty-rate measurement is running."""
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

    def _progress_limit(self, kind: Kind, total: int) -> ProgressLimit:
        seconds = NO_PROGRESS_SECONDS[kind]
        if kind is not Kind.POPULATE:
            return ProgressLimit(total, seconds)
        before = thread_names(self._process).keys()

        def populating() -> set[int]:
            """Return the threads that QEMU has started since then, as it does for the job."""
            return thread_names(self._process).keys() - before

        idle = IdleThreads(self._process, populating, faults_only=True)
        return ProgressLimit(total, seconds, idle)

    async def _wait(
        self,
        job: str,
        events: EventStream,
        on_progress: Callable[[int], None],
        limit: ProgressLimit | None = None,
    ) -> None:
        """Wait until the job has ended.

        :param limit: The limit of the time without progress, or None for no limit.
        :raises AgentError: If the job makes no progress, or if another client has dismissed it.
        :raises FailedError: If QEMU has closed the QMP connection.
        """
        read_at = time.monotonic()
        while True:
            left = read_at + PROGRESS_SECONDS - time.monotonic()
            if left > 0:
                with contextlib.suppress(TimeoutError):
                    event = await events.get(left)
                    if event is None:
                        raise FailedError(
                            "QEMU closed the QMP connection while its prefault job was running",
                            "check whether QEMU is still running",
                            code=Code.MONITOR_CLOSED,
                        )
                    if event.data.get("id") == job and event.data.get("status") in OVER:
                        return
                    continue
            jobs = await _read_jobs(self._monitor)
            read_at = time.monotonic()
            mine = next((found for found in jobs if found.id == job), None)
            if mine is None:
                raise AgentError(
                    f"another QMP client dismissed QEMU's job {job} (job-dismiss)",
                    "run qemu-prefault again",
                )
            on_progress(mine.progress)
            if mine.status in OVER:
                return
            if limit and (seconds := limit.exceeded(mine.progress)) is not None:
                raise AgentError(
                    f"QEMU's job {job} made no progress for {seconds:.1f} s",
                    "check whether the host is short of CPU time or memory. Then run "
                    "qemu-prefault again",
                )

    def _gpa(self, item: Range) -> int:
        """Return the guest-physical address at which a range starts.

        :param item: A range that starts at a host virtual address.
        """
        for section in self._sections():
            if section.hva and section.hva <= item.start < section.hva + section.size:
                return section.gpa + (item.start - section.hva)
        raise AgentError(
            f"QEMU unplugged the guest memory at the host address {item.start:#x} during the run",
            "run qemu-prefault again",
        )

    async def _end(self, job: str) -> None:
        with self._monitor.events("JOB_STATUS_CHANGE") as events:
            await self._cancel(job)
            await self._wait(job, events, lambda _: None)

    async def _dismiss(self, job: str) -> None:
        with contextlib.suppress(CommandError):  # another client has dismissed the job
            await self._monitor.execute("job-dismiss", id=job)

    async def _cancel(self, job: str) -> None:
        with contextlib.suppress(CommandError):  # the job has ended
            await self._monitor.execute("job-cancel", id=job)

    async def hold_vcpus(self) -> bool:
        """Return False, because QEMU's own vCPU threads process the ranges."""
        return False

    async def release_vcpus(self) -> None:
        """Do nothing, because :meth:`hold_vcpus` does nothing."""

    def abort(self) -> None:
        """See :meth:`.Agent.abort`."""
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        """See :meth:`.Agent.interrupt`."""
        if self._job is not None and self._monitor.alive:
            task = asyncio.get_running_loop().create_task(self._cancel(self._job))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    def orphan_cleanup(self) -> OrphanCleanup:
        """Return a cleanup that has no effect.

        If this process is killed, QEMU's job continues to its end. The job occupies a vCPU only for
        one short chunk of memory at a time. If qemu-prefault is started again while the job is
        running, qemu-prefault cancels the job.
        """
        return OrphanCleanup(stop_helpers=lambda: None, helpers_gone=lambda: True, timeout=0.0)

    async def close(self) -> None:
        """See :meth:`.Agent.close`."""
        await asyncio.gather(*self._cancelling, return_exceptions=True)


def _match(items: Sequence[Range], reported: Sequence[object], kind: Kind) -> list[Outcome]:
    """Convert QEMU's report on a job into the outcomes of ranges.

    QEMU reports each range as one or more pieces.

    :raises LayoutError: If the report is malformed or incomplete.
    """
    pieces = iter(reported)
    bytes_done = "mapped" if kind is Kind.STAGE2 else "populated"
    outcomes = []
    for item in items:
        size = done = error = 0
        while size < item.size:
            piece = expect_object(next(pieces, None), f"a range of {QUERY}")
            sizes = {
                key: expect_int(piece.get(key), f"{key} of {QUERY}")
                for key in ("size", bytes_done, "absent")
            }
            size += sizes["size"]
            if not error:  # an outcome counts bytes from the start of the range to the first error
                done += sizes[bytes_done] + sizes["absent"]
                error = expect_int(
                    piece.get("error-number", 0), f"error-number of {QUERY}", 0, MAX_ERRNO
                )
        outcomes.append(Outcome(item, min(done, item.size), error))
    return outcomes
