# SPDX-License-Identifier: GPL-2.0-or-later
"""The attach agent, which starts helper threads in a running QEMU with ptrace.

This module stops a thread of QEMU, and makes the thread execute three system calls, which start a
helper thread. The thread then continues with its original registers (native/ptrace/inject.c). The
helper and this process communicate through one control page. This process accesses this page
through ``/proc/PID/mem``.

This process writes a heartbeat to the control page. If the heartbeat stops, for example because
this process was killed, the helper completes its current system call, unmaps itself and exits.
Therefore no helper remains in QEMU.

The thread creates a helper with clone(), so the helper inherits the memory policy, the scheduling
class, the CPUs and the cgroup of the thread. This process immediately changes all of these
properties except the memory policy (host/placement.py).

This module has one subject, the class :class:`PtraceAgent`, so it is longer than 400 lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from .._native import lib
from ..errors import AgentError, Code, QemuPrefaultError
from ..host.cpu_quota import CpuQuota, cpu_quota
from ..host.kernel_log import exit_error
from ..host.procfs import Process
from ..host.stall import STALL_SECONDS, IdleThreads, ProgressLimit, Stall, why_stalled
from .base import BatchResult, Kind, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker
from .control_page import Header, Helper, offset_of
from .helper_calls import Allowed
from .injector import START_SECONDS, Injector
from .qemu_process import (
    HELPER_NAME,
    busy_error,
    helper_threads,
    lock_memory,
    open_memory,
    stays_alive,
    unlock_memory,
)
from .run_gate import RunGate, lost_error
from .ticker import END_SECONDS, Ticker

_T = TypeVar("_T")

#: Shortest and longest time between two reads of the control pages, in seconds.
POLL_SHORTEST, POLL_LONGEST = 0.001, 0.25
#: A rate in bytes per second that no host exceeds. It determines when the control pages are first
#: read.
FASTEST = 32 << 30
#: Seconds after which a run fails if the helpers make no progress, by the kind of their work. While
#: helpers prefault, the guest may be paused. While they populate, the guest runs, and the kernel
#: may have to reclaim memory. If the helpers are idle, the run fails earlier
#: (:class:`.IdleThreads`).
NO_PROGRESS_SECONDS = {Kind.STAGE2: 7.0, Kind.POPULATE: 60.0}
#: Seconds in which all helpers must start.
READY_SECONDS = 5.0
#: Seconds to wait for the end of the helpers and of the run gate together, after a failure. A QEMU
#: that causes the failure can also delay their end.
FAILED_SECONDS = 1.0
#: Seconds to wait for the end of the run gate after other runs, if a helper has not exited.
GATE_SECONDS = 1.0
#: Maximum size of one ioctl in bytes if QEMU's CPU time is limited. The kernel can stop the helper
#: in the ioctl until the next period.
QUOTA_CHUNK = 2 << 20


def within_quota(limits: Limits, quota: CpuQuota | None) -> Limits:
    """Return the limits of helpers that use at most a part of QEMU's CPU time to populate."""
    if quota is None or not quota.rest_percent:
        return limits
    return replace(
        limits,
        chunk_bytes=min(limits.chunk_bytes, QUOTA_CHUNK),
        rest_percent=quota.rest_percent,
        rest_bytes=min(limits.chunk_bytes, quota.chunk_bytes),
    )


class PtraceAgent:
    """The :class:`.Agent` that uses helper threads in QEMU as workers."""

    name = "attach"
    needs_pause = True
    ranges_per_batch = int(lib.PREFAULT_RANGES_MAX)

    def __init__(
        self, process: Process, threads: Sequence[VcpuThread], limits: Limits | None = None
    ) -> None:
        self.process = process
        self.limits = limits or Limits()
        self.workers = tuple(
            Worker(index, thread.vcpu_id, thread.node) for index, thread in enumerate(threads)
        )
        self._threads = tuple(threads)
        self.warnings: dict[str, str] = {}
        self._helpers: dict[int, Helper] = {}
        self._memory = -1
        self._allowed = Allowed()
        self._ticker: Ticker | None = None
        self._gate: RunGate | None = None
        self._aborted = False
        self._failed = False
        self._told_to_end = asyncio.Event()
        self._heart: threading.Thread | None = None
        self._heart_stop = threading.Event()

    async def start(self) -> None:
        """Start one helper for each vCPU.

        An idle thread of QEMU starts the helpers. If QEMU has no idle thread, each vCPU's thread
        starts its helper. The agent usually stops the thread for less than 1 ms.

        :raises UnsupportedError: If this process has no permission to trace QEMU, if the agent does
            not support QEMU's libc, if a security module denies executable anonymous memory, if a
            seccomp filter denies a system call, if QEMU's stacks are too small, or if QEMU runs
            with a hardware shadow stack.
        :raises RefusedError: If another qemu-prefault is working in this QEMU, or if a limit
            prevents QEMU from starting another thread.
        :raises AgentError: If a thread cannot be stopped, or if a helper does not start.
        :raises FailedError: If QEMU or the thread has exited.
        """
        # The kernel attaches tracees to a thread, and detaches them when the thread exits.
        # Therefore one thread makes all ptrace calls and then exits.
        quota = cpu_quota(self.process)
        self.limits = within_quota(self.limits, quota)
        if quota is not None and quota.rest_percent:
            self.warnings[Code.CPU_QUOTA] = quota.warning()
        try:
            await self._wait_until_alone()
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptrace") as executor:
                await asyncio.get_running_loop().run_in_executor(executor, self._inject_all)
            await self._wait_ready()
            unlock_memory(self._memory)  # the helpers now exclude other runs
            if not self._allowed.timers:
                self._start_ticker()
            if any(thread.fd >= 0 for thread in self._threads):
                self._gate = RunGate(
                    self.process,
                    self._memory,
                    [thread.thread_id for thread in self._threads],
                    [self._helpers[worker.index] for worker in self.workers],
                )
        except BaseException:
            self._failed = True
            await self.close()
            raise

    async def _wait_until_alone(self) -> None:
        """Open QEMU's memory, and wait until no other run works in QEMU.

        :raises RefusedError: If another run still works in QEMU after the time that a helper of a
            killed run needs to exit.
        """
        self._memory = open_memory(self.process)
        deadline = time.monotonic() + self.limits.dead_man + self.limits.stuck + 1
        while not lock_memory(self._memory) or helper_threads(self.process):
            if time.monotonic() > deadline:
                raise busy_error(self.process)
            await asyncio.sleep(0.05)

    def _inject_all(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        injector = Injector(self.process, self._memory, self._threads, self.limits, deadline)
        injector.unmap_abandoned_areas()
        for worker in self.workers:
            helper = injector.start_helper(worker.index)
            self._helpers[worker.index] = helper
            self._start_heart()
            refused = injector.place(worker.index, helper, self._header(helper).tid)
            if refused:
                self.warnings[Code.HELPER_PLACEMENT] = (
                    "qemu-prefault has no permission to change these properties of a helper "
                    f"thread: {', '.join(refused)}; run qemu-prefault with CAP_SYS_NICE and write "
                    "access to QEMU's cgroups"
                )
        self._allowed = injector.allowed

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        for helper in self._helpers.values():
            while not (ready := self._header(helper).ready):
                if time.monotonic() > deadline:
                    raise AgentError(
                        f"a helper thread did not start within {READY_SECONDS:g} s",
                        "run qemu-prefault again when the host is less loaded\nQEMU is unharmed",
                    )
                await asyncio.sleep(0.001)
            if ready == -errno.EPROTO:
                raise AgentError(
                    "a helper thread did not start, because QEMU has overwritten its control page",
                    "check whether QEMU is compromised, or use the plugin agent",
                )
            if ready != 1:
                raise AgentError(
                    f"a helper thread could not set its timer: {os.strerror(-ready)}",
                    "raise QEMU's limit on pending signals (ulimit -i), or use the plugin agent\n"
                    "QEMU is unharmed",
                )

    def _start_ticker(self) -> None:
        helpers = [(h.thread_id, self._header(h).tick_signal) for h in self._helpers.values()]
        helpers = [(tid, number) for tid, number in helpers if tid and number]
        self._ticker = Ticker(self.process.pid, helpers, HELPER_NAME, self.limits.tick)

    def _start_heart(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        """Write the heartbeat of every helper periodically, in a separate thread."""
        beat = 0
        while True:
            beat += 1
            for helper in list(self._helpers.values()):
                # If a helper or QEMU has exited, run() and close() detect this.
                with contextlib.suppress(OSError):
                    helper.write_word("heartbeat", beat)
            if self._heart_stop.wait(self.limits.dead_man / 10):
                return

    async def hold_vcpus(self) -> bool:
        """See :meth:`.Agent.hold_vcpus`.

        :raises UnsupportedError: If this process has no permission to trace QEMU.
        :raises AgentError: If the thread of a vCPU does not stop.
        """
        if self._gate is None:
            return False
        with self._note_failure():
            await self._gate.hold()
        self._tell_all("rest_percent", 0)  # a rest would only make the pause longer
        return True

    async def release_vcpus(self) -> None:
        """See :meth:`.Agent.release_vcpus`."""
        self._tell_all("rest_percent", self.limits.rest_percent)
        if self._gate is not None:
            await self._gate.release()

    def _check_held(self, batch: Mapping[int, Sequence[Range]]) -> None:
        prefaults = any(item.kind is Kind.STAGE2 for items in batch.values() for item in items)
        if prefaults and (self._gate is None or not self._gate.holds()):
            self.abort()
            raise lost_error()

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """See :meth:`.Agent.run`.

        If the batch prefaults memory, the caller must first call :meth:`hold_vcpus`.

        :raises FailedError: If QEMU has exited (code ``qemu-gone``), or if a helper has exited
            (code ``agent-left``).
        :raises AgentError: If the batch prefaults memory, but the vCPUs can enter KVM_RUN, or if
            the helpers make no progress (:data:`NO_PROGRESS_SECONDS`).
        """
        with self._note_failure():
            return await self._run(batch, on_progress)

    @contextlib.contextmanager
    def _note_failure(self) -> Iterator[None]:
        """Make :meth:`close` wait only briefly if the block fails."""
        try:
            yield
        except QemuPrefaultError:
            self._failed = True
            raise

    async def _run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        self._check_held(batch)
        if not self._aborted:
            self._told_to_end.clear()
            self._tell_all("abort", 0)
        for index, ranges in batch.items():
            self._guarded(self._helpers[index].submit, ranges)
        finished: dict[int, tuple[Outcome, ...]] = {}
        started, ended = [], []
        begun = time.monotonic()
        left = max((sum(i.size for i in ranges) for ranges in batch.values()), default=0) / FASTEST
        stall = Stall()
        limit = self._progress_limit(batch, finished)
        while len(finished) < len(batch):
            await self._wait(min(max(left, POLL_SHORTEST), POLL_LONGEST))
            self._check_held(batch)
            left = 0.0
            done = failed = chunks = 0  # bytes, bytes, and a number that changes with each chunk
            for index, ranges in batch.items():
                helper = self._helpers[index]
                outcomes = finished.get(index)
                if outcomes is None:
                    header = self._header(helper)
                    chunks += header.chunk_started_ns
                    outcomes = self._guarded(helper.outcomes, ranges)
                    if header.batch_done == helper.batch:
                        finished[index] = outcomes
                        started.append(header.batch_started_ns)
                        ended.append(header.batch_finished_ns)
                    else:
                        left = max(left, _seconds_left(begun, header, outcomes))
                done += sum(outcome.done for outcome in outcomes)
                failed += sum(each.range.size - each.done for each in outcomes if each.error)
            on_progress(done)
            working = [self._helpers[index] for index in batch if index not in finished]
            if stall.starts((done, chunks)):
                self._report_stall(working)
            seconds = limit.exceeded(done + failed)
            if working and seconds is not None:
                self.abort()
                raise self._no_progress(working, seconds)
        worked = (max(ended) - min(started)) / 1e9 if ended else 0.0
        # The times come from the control pages.
        return BatchResult(finished, min(max(worked, 0.0), time.monotonic() - begun))

    def _no_progress(self, helpers: Sequence[Helper], seconds: float) -> AgentError:
        return AgentError(
            f"the helper threads in QEMU (pid {self.process.pid}) made no progress for "
            f"{seconds:.1f} s: {self._why_stalled(helpers)}",
            "resolve the reason, and run qemu-prefault again",
        )

    def _progress_limit(
        self, batch: Mapping[int, Sequence[Range]], finished: Collection[int]
    ) -> ProgressLimit:
        """Return the limit for a batch.

        :param finished: The indexes of the helpers that have completed the batch.
        """
        items = [item for ranges in batch.values() for item in ranges]
        kinds = {item.kind for item in items} or {Kind.STAGE2}

        def working() -> list[int]:
            return [self._helpers[index].thread_id for index in batch if index not in finished]

        return ProgressLimit(
            sum(item.size for item in items),
            min(NO_PROGRESS_SECONDS[kind] for kind in kinds),
            IdleThreads(self.process, working, faults_only=kinds == {Kind.POPULATE}),
        )

    def _why_stalled(self, helpers: Sequence[Helper]) -> str:
        reasons = {why_stalled(self.process, helper.thread_id) for helper in helpers}
        return "; ".join(sorted(reasons))

    def _report_stall(self, helpers: Sequence[Helper]) -> None:
        """Log why these helpers make no progress, and store the text as a warning."""
        text = f"no progress for {STALL_SECONDS:g} s: {self._why_stalled(helpers)}"
        self.warnings[Code.NO_PROGRESS] = text
        logging.getLogger(__name__).warning(text)

    async def _wait(self, seconds: float) -> None:
        """Wait before the control pages are read again.

        After an abort, wait only briefly. Each helper then ends its batch after its current system
        call, and the guest may be paused until all helpers have ended their batches.

        :param seconds: The time to wait if the batch is not aborted.
        """
        if self._told_to_end.is_set():
            await asyncio.sleep(POLL_SHORTEST)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._told_to_end.wait()

    def _header(self, helper: Helper) -> Header:
        return self._guarded(helper.read_header)

    def _guarded(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function that accesses QEMU's memory, and return its result.

        If the call fails, raise an error that states whether QEMU or a helper has exited.
        """
        try:
            return function(*args)
        except (OSError, ValueError) as error:
            if stays_alive(self.process):
                raise AgentError(
                    "a helper thread in QEMU exited before its batch was complete",
                    f"check why qemu-prefault did not run for {self.limits.dead_man:g} s (for "
                    "example, an overloaded host), and run qemu-prefault again",
                    code=Code.AGENT_LEFT,
                ) from error
            raise exit_error(
                self.process, f"QEMU (pid {self.process.pid}) exited during the prefault"
            ) from error

    def abort(self) -> None:
        """See :meth:`.Agent.abort`."""
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        """See :meth:`.Agent.interrupt`."""
        self._tell_all("abort")
        self._told_to_end.set()

    def _tell_all(self, field: str, value: int = 1) -> None:
        for helper in self._helpers.values():
            with contextlib.suppress(OSError):
                helper.write_word(field, value)

    def orphan_cleanup(self) -> OrphanCleanup:
        """See :meth:`.Agent.orphan_cleanup`."""
        memory, process, gate = self._memory, self.process, self._gate
        where = tuple(
            helper.control + offset_of(field)
            for helper in self._helpers.values()
            for field in ("abort", "release")
        )

        def stop_helpers() -> None:
            for address in where:
                with contextlib.suppress(OSError):
                    os.pwrite(memory, (1).to_bytes(4, "little"), address)
            if gate is not None:
                gate.end()

        return OrphanCleanup(
            stop_helpers,
            lambda: not helper_threads(process),
            self.limits.stuck + self.limits.dead_man,
        )

    async def close(self) -> None:
        """End the helpers, and wait until all of them have exited.

        If the agent has failed, the method waits for at most :data:`FAILED_SECONDS`, and raises no
        second error. A helper that is then still in a system call exits when the call returns.

        :raises AgentError: If a helper is blocked in the kernel. The helper exits when its system
            call returns.
        """
        patience = self.limits.stuck + self.limits.dead_man + 2
        deadline = time.monotonic() + (FAILED_SECONDS if self._failed else patience)
        self._tell_all("release")
        if self._failed and self._gate is not None:
            self._gate.end()  # the gate waits for the helpers at the same time
        gone = False
        try:
            gone = await self._wait_gone(deadline)
        finally:
            try:
                await self._end_children(deadline)
            finally:
                self._heart_stop.set()
                if self._heart is not None:
                    self._heart.join()
                    self._heart = None
                self._helpers.clear()
                if self._memory >= 0:
                    os.close(self._memory)
                    self._memory = -1
        if not gone and not self._failed:
            raise AgentError(
                f"a helper thread in QEMU (pid {self.process.pid}) is blocked in the kernel",
                "no action is needed, because the helper exits when its system call returns",
            )

    async def _end_children(self, deadline: float) -> None:
        """End the ticker and the run gate.

        :param deadline: The time of the monotonic clock in seconds until which the helpers could
            exit.
        """
        gate, self._gate = self._gate, None
        ticker, self._ticker = self._ticker, None
        try:
            if ticker is not None:
                await ticker.wait(min(max(deadline - time.monotonic(), 0), END_SECONDS))
        finally:
            if gate is not None:
                least = 0 if self._failed else GATE_SECONDS
                await gate.close(max(deadline - time.monotonic(), least))

    async def _wait_gone(self, deadline: float) -> bool:
        """Return whether all helpers have exited by the deadline."""
        pause = 0.0005
        # A helper that has just been started may not have set its name yet.
        while any(helper.is_there() for helper in self._helpers.values()) or (
            self._helpers and helper_threads(self.process)
        ):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)
        return True


def _seconds_left(begun: float, header: Header, outcomes: Sequence[Outcome]) -> float:
    """Return the seconds to wait before the helper's control page is read again.

    This process reads the page rarely, because this process may share a CPU with the helper.

    :param begun: The value of ``time.monotonic()`` when the batch was submitted.
    :param header: The header of the helper's control page.
    :param outcomes: The current outcomes of the helper's ranges.
    """
    now = time.monotonic()
    done = sum(outcome.done for outcome in outcomes)
    left = sum(outcome.range.size - outcome.done for outcome in outcomes if not outcome.error)
    spent = (header.chunk_started_ns - header.batch_started_ns) / 1e9
    if not done or spent <= 0:
        return now - begun
    wait: float = header.chunk_started_ns / 1e9 + spent * left / done - now
    return wait if done > left else wait * 0.9
