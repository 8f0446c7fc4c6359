# SPDX-License-Identifier: GPL-2.0-or-later
"""Detect that helper threads make no progress, and find the reason."""

from __future__ import annotations

import os
import time
from typing import Final

from .proc_files import read_optional
from .procfs import Process

#: Seconds without progress after which the run reports the reason.
STALL_SECONDS: Final = 2.0


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


class ProgressLimit:
    """Detects that helpers report no progress for too long.

    A helper updates a counter for each chunk, also if it retries the chunk. It abandons a chunk
    that it has retried for a limited time. A QEMU that its guest has taken over can write any
    numbers to the control pages. Therefore a change of the counter is not enough: the number of
    completed bytes, or the number of failed ranges, must also grow, but may do so later.

    :param seconds: The maximum time without any change, in seconds.
    :param retry_seconds: The additional time that a helper retries a chunk, in seconds.
    """

    def __init__(self, seconds: float, retry_seconds: float) -> None:
        self._seconds = seconds
        self._retry_seconds = retry_seconds
        self._seen: tuple[int, int, int] | None = None
        self._done = self._failed = -1
        self._changed_at = self._grown_at = time.monotonic()

    def is_reached(self, done: int, failed: int, chunks: int) -> bool:
        """Return whether the helpers have made no progress for too long.

        :param done: The number of completed bytes.
        :param failed: The number of ranges with an error.
        :param chunks: A number that changes with each chunk.
        """
        now = time.monotonic()
        if (done, failed, chunks) != self._seen:
            self._seen, self._changed_at = (done, failed, chunks), now
        if done > self._done or failed > self._failed:
            self._done, self._failed = max(done, self._done), max(failed, self._failed)
            self._grown_at = now
        return (
            now - self._changed_at > self._seconds
            or now - self._grown_at > self._seconds + self._retry_seconds
        )


def thread_state(process: Process, tid: int) -> str:
    """Return the state of a thread as in proc(5), or an empty string if it has exited."""
    stat = read_optional(f"{process.proc}/task/{tid}/stat") or ""
    return stat[stat.rfind(")") + 2 :][:1]


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
