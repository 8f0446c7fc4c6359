# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that interrupts helpers which may not make timers.

A helper's own timer interrupts an ioctl that does not end. Where a seccomp filter denies
timer_create(), this process sends the same signal from outside. It is not the tool itself, so
that it goes on when the tool is killed, until the last helper has left.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable

from .._native import lib
from ..host.procfs import PROC, read_optional


class Ticker:
    """The process; it ends by itself when the helpers have left."""

    def __init__(self, pid: int, helpers: Iterable[tuple[int, int]], name: str, seconds: float):
        """
        :param helpers: thread id and signal of each. :param name: the name of their threads.
        """
        self._child = os.fork()
        if self._child == 0:
            try:
                _become_independent()
                _tick(pid, set(helpers), name, seconds)
            finally:
                os._exit(0)

    def wait(self) -> None:
        """Wait for its end; only when the helpers have left."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)


def _become_independent() -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    # The monitor's connection among others: QEMU is to see that the tool has gone.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _tick(pid: int, helpers: set[tuple[int, int]], name: str, seconds: float) -> None:
    while helpers:
        for tid, number in tuple(helpers):
            text = read_optional(f"{PROC}/{pid}/task/{tid}/status") or ""
            if not text.startswith(f"Name:\t{name}\n") or "\nState:\tZ" in text:
                helpers.discard((tid, number))
            elif not is_pending(text, number):
                lib.send_signal(pid, tid, number)
        time.sleep(seconds)


def is_pending(status: str, number: int) -> bool:
    """Whether a thread has this signal pending already; real-time signals would queue up."""
    match = re.search(r"^SigPnd:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return bool(match and int(match[1], 16) >> (number - 1) & 1)
