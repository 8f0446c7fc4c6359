# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt the system calls of helpers that cannot create timers.

A helper normally has its own timer, which interrupts an ioctl that does not return. If a seccomp
filter denies timer_create(), this module starts a separate process that sends the signal of this
timer. If qemu-prefault is killed, the separate process continues until the last helper has exited.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable

from .._native import lib
from ..host.proc_files import PROC, read_optional
from .child import end_child

#: Seconds to wait until the process has detected that all helpers have exited.
END_SECONDS = 1.0


class Ticker:
    """A process that periodically sends a signal to each helper.

    The process exits when all helpers have exited.
    """

    def __init__(self, pid: int, helpers: Iterable[tuple[int, int]], name: str, seconds: float):
        """Start the process that sends the signals.

        :param pid: The pid of QEMU.
        :param helpers: The thread id and the signal number of each helper.
        :param name: The name of the helper threads.
        :param seconds: The time between two signals to a helper, in seconds.
        """
        self._child = os.fork()
        if self._child == 0:
            try:
                _become_independent()
                _tick(pid, set(helpers), name, seconds)
            finally:
                os._exit(0)

    async def wait(self, seconds: float = END_SECONDS) -> None:
        """Wait until the process has exited, and kill it after a time limit.

        The process continues until all helpers have exited. Therefore the caller must first wait
        until all helpers have exited, or must have asked them to end their work. A helper that is
        still in a system call then has a pending signal, which ends the call if the call can be
        interrupted. QEMU can rename a thread, so that the process never ends by itself.

        :param seconds: The time limit, in seconds.
        """
        await end_child(self._child, seconds)


def _become_independent() -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    # Close the QMP connection and all other descriptors. Otherwise the QMP connection would stay
    # open after the tool is killed.
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

    If a pending real-time signal is sent again, the kernel queues it a second time (signal(7)).

    :param status: The text of ``/proc/PID/task/TID/status``.
    :param number: The number of the signal.
    """
    match = re.search(r"^SigPnd:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return bool(match and int(match[1], 16) >> (number - 1) & 1)
