# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt helpers that cannot create timers, from a separate process.

If an ioctl does not return, the helper's own timer interrupts it. If a seccomp filter denies
timer_create(), this separate process sends the same signal instead. If the tool is killed, the
process continues until the last helper has exited.
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
    """The process that sends the signals. It exits when all helpers have exited."""

    def __init__(self, pid: int, helpers: Iterable[tuple[int, int]], name: str, seconds: float):
        """Start the process.

        :param helpers: The thread id and the signal of each helper.
        :param name: The name of the helper threads.
        :param seconds: The interval of the signals.
        """
        self._child = os.fork()
        if self._child == 0:
            try:
                _become_independent()
                _tick(pid, set(helpers), name, seconds)
            finally:
                os._exit(0)

    def wait(self) -> None:
        """Wait until the process exits. Call this only after the helpers have exited."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)


def _become_independent() -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    # Close the QMP connection and all other descriptors. Otherwise the QMP connection would stay
    # open if the tool is killed.
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
    """Return whether the signal is pending in a thread.

    A pending real-time signal that is sent again would be queued twice.
    """
    match = re.search(r"^SigPnd:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return bool(match and int(match[1], 16) >> (number - 1) & 1)
