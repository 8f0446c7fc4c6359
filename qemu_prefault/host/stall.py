# SPDX-License-Identifier: GPL-2.0-or-later
"""Detect that helper threads make no progress, and find the reason."""

from __future__ import annotations

import os
import time
from typing import Final

from . import procfs
from .procfs import read_optional

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


def why_stalled(pid: int, tid: int, seconds: float = 0.05) -> str:
    """Return the reason why a helper thread makes no progress, according to /proc.

    :param seconds: The time between two reads of the helper's CPU time, in seconds.
    """
    task = f"{procfs.PROC}/{pid}/task/{tid}"
    before = _cpu_time(task)
    time.sleep(seconds)
    stat = read_optional(f"{task}/stat") or ""
    state = stat[stat.rfind(")") + 2 :][:1]
    if state in "Tt" and state:
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
