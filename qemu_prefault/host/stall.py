# SPDX-License-Identifier: GPL-2.0-or-later
"""Detect that helper threads make no progress, and find the reason."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from .proc_files import read_optional, stat_fields
from .procfs import Process

#: Seconds without progress after which the run reports the reason.
STALL_SECONDS: Final = 2.0
#: Number of bytes that an agent must complete within its time limit.
LEAST_PROGRESS: Final = 1 << 20
#: Seconds for which the threads of an agent may be idle.
IDLE_SECONDS: Final = 4.0
#: Seconds without progress after which :class:`IdleThreads` measures.
IDLE_AFTER: Final = 1.0
#: Least interval in seconds between two readings by :class:`IdleThreads`.
IDLE_INTERVAL: Final = 0.5
#: Number of page faults that threads which populate memory take within :data:`IDLE_SECONDS`, unless
#: the host works at less than 16 KiB per second. Threads with other tasks take fewer, but not none.
LEAST_FAULTS: Final = 16
#: The number of sleeps of a thread in ``/proc/PID/task/TID/status``.
SLEEPS: Final = re.compile(r"^voluntary_ctxt_switches:\s*(\d+)$", re.MULTILINE)


class Stall:
    """Detects a stall.

    A stall is a state that has not changed for :data:`STALL_SECONDS`.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._since = 0.0
        self._reported = False

    def starts(self, state: object) -> bool:
        """Return True at the first call that detects each stall, otherwise False.

        :param state: The current state.
        """
        now = time.monotonic()
        if state != self._seen:
            self._seen, self._since, self._reported = state, now, False
        elif not self._reported and now - self._since > STALL_SECONDS:
            self._reported = True
            return True
        return False


@dataclass(frozen=True, slots=True)
class ThreadWork:
    """What the kernel has counted for a thread (proc(5), ``stat`` and ``status``).

    :ivar state: The state, e.g. ``R``, ``S`` or ``D``.
    :ivar faults: The number of page faults, minor and major.
    :ivar seconds: The CPU time in seconds.
    :ivar sleeps: How often the thread has given up its CPU to wait for something
        (``voluntary_ctxt_switches``).
    """

    state: str
    faults: int
    seconds: float
    sleeps: int

    @classmethod
    def read(cls, process: Process, tid: int) -> ThreadWork | None:
        """Return the numbers of a thread, or None if the thread has exited."""
        task = f"{process.proc}/task/{tid}"
        fields = stat_fields(read_optional(f"{task}/stat") or "")
        sleeps = SLEEPS.search(read_optional(f"{task}/status") or "")
        try:
            return cls(
                state=fields[0],
                faults=int(fields[7]) + int(fields[9]),
                seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
                sleeps=int(sleeps[1]) if sleeps else 0,
            )
        except (IndexError, ValueError):
            return None


class IdleThreads:
    """Measures for how long threads have done nothing, according to the kernel.

    A QEMU that its guest has taken over can report any progress, but the kernel counts the threads'
    page faults and CPU time. A thread that populates memory takes a page fault for each page, also
    in ``MADV_POPULATE_WRITE`` (``mm_account_fault()``, mm/memory.c). A thread that waits for a CPU
    cannot work, so it is not idle. A thread that often sleeps for a short time also waits for a CPU
    after each sleep, but it is idle.

    :param process: QEMU.
    :param threads: A function that returns the thread ids.
    :param faults_only: Whether only page faults are work, as for threads that populate memory.
        Otherwise CPU time also is. Fewer than :data:`LEAST_FAULTS` are no work.
    """

    def __init__(
        self, process: Process, threads: Callable[[], Iterable[int]], *, faults_only: bool
    ) -> None:
        self._process = process
        self._threads = threads
        self._faults_only = faults_only
        self._seen: dict[int, ThreadWork] | None = None
        self._read_at = 0.0
        self._faults = 0  # since the threads have been idle
        self._idle = 0.0

    def reset(self) -> None:
        """Start again at 0 seconds."""
        self._seen, self._faults, self._idle = None, 0, 0.0

    def seconds(self) -> float:
        """Return for how many seconds the threads have been idle since the first call.

        The result grows by at most a second per call, because this process may have waited longer
        for a CPU.
        """
        now = time.monotonic()
        passed = now - self._read_at
        if self._seen is not None and passed < IDLE_INTERVAL:
            return self._idle
        before, self._seen, self._read_at = self._seen, self._read(), now
        if before is None:
            return self._idle
        pairs = [(before[tid], work) for tid, work in self._seen.items() if tid in before]
        self._faults += sum(max(new.faults - old.faults, 0) for old, new in pairs)
        if self._faults >= LEAST_FAULTS or any(self._works(*pair, passed) for pair in pairs):
            self._faults, self._idle = 0, 0.0
        else:
            self._idle += min(passed, 1.0)
        return self._idle

    def _read(self) -> dict[int, ThreadWork]:
        found = {tid: ThreadWork.read(self._process, tid) for tid in self._threads()}
        return {tid: work for tid, work in found.items() if work is not None}

    def _works(self, before: ThreadWork, now: ThreadWork, passed: float) -> bool:
        used = now.seconds - before.seconds
        stayed_runnable = before.state == now.state == "R" and now.sleeps == before.sleeps
        waits_for_cpu = stayed_runnable and used < passed / 10
        return waits_for_cpu or (used > 0 and not self._faults_only)


class ProgressLimit:
    """Detects that an agent makes no progress for too long.

    QEMU reports the completed bytes. A QEMU that its guest has taken over can report any number,
    for example one more byte each second. Therefore only :data:`LEAST_PROGRESS` bytes are progress,
    or all bytes of the batch.

    :param total: The number of bytes in the batch.
    :param seconds: The maximum time without progress, in seconds.
    :param idle: Measures the threads that work on the batch. If they are idle for
        :data:`IDLE_SECONDS`, the limit is reached earlier.
    """

    def __init__(self, total: int, seconds: float, idle: IdleThreads | None = None) -> None:
        self._total = total
        self._seconds = seconds
        self._idle = idle
        self._counted = 0
        self._counted_at = time.monotonic()

    def exceeded(self, done: int) -> float | None:
        """Return the time without progress in seconds if it is too long, otherwise None.

        :param done: The number of completed bytes. Ranges that have failed count as completed.
        """
        now = time.monotonic()
        done = min(done, self._total)
        left = self._total - self._counted
        if left and done - self._counted >= min(LEAST_PROGRESS, left):
            self._counted, self._counted_at = done, now
            if self._idle:
                self._idle.reset()
        without = now - self._counted_at
        if without > self._seconds:
            return without
        if self._idle and without > IDLE_AFTER and self._idle.seconds() >= IDLE_SECONDS:
            return without
        return None


def thread_state(process: Process, tid: int) -> str:
    """Return the state of a thread as in proc(5), or an empty string if it has exited."""
    return "".join(stat_fields(read_optional(f"{process.proc}/task/{tid}/stat") or "")[:1])


def why_stalled(process: Process | int, tid: int, seconds: float = 0.05) -> str:
    """Return the reason why a helper thread makes no progress, according to /proc.

    :param process: The process or its pid.
    :param seconds: The time between two reads of the helper's CPU time, in seconds.
    """
    if isinstance(process, int):
        process = Process(process, 0)
    task = f"{process.proc}/task/{tid}"
    before = _cpu_time(task)
    time.sleep(seconds)
    state = thread_state(process, tid)
    if state in ("T", "t"):
        return "QEMU is stopped (by SIGSTOP, a debugger or the cgroup freezer)"
    if state == "R" and _cpu_time(task) == before:
        try:
            cpus = ",".join(map(str, sorted(os.sched_getaffinity(tid))))
        except OSError:
            cpus = "?"
        return f"helper {tid} gets no CPU time: other threads keep CPU {cpus} busy"
    if state == "R":
        return f"helper {tid} is running in the kernel, and still processes the same chunk"
    where = (read_optional(f"{task}/wchan") or "").strip("0 \n")
    return f"helper {tid} waits in the kernel" + (f" ({where})" if where else "")


def _cpu_time(task: str) -> str:
    return (read_optional(f"{task}/schedstat") or "").partition(" ")[0]
