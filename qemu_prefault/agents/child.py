# SPDX-License-Identifier: GPL-2.0-or-later
"""Wait for the end of a child process within a time limit."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Final

#: Seconds to wait for the end of a process that was killed. The process may be in a system call
#: that SIGKILL does not interrupt.
KILLED_SECONDS: Final = 1.0


async def end_child(pid: int, seconds: float) -> None:
    """Wait until a child process has exited, and kill it after a time limit.

    :param seconds: The time limit, in seconds.
    """
    if await _has_exited(pid, seconds):
        return
    os.kill(pid, signal.SIGKILL)
    await _has_exited(pid, KILLED_SECONDS)


async def _has_exited(pid: int, seconds: float) -> bool:
    """Return whether a child process exits within a time limit."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:  # the embedding program has reaped the process
            return True
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.02)
