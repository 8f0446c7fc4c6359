# SPDX-License-Identifier: GPL-2.0-or-later
"""Limit the time for which this process waits for QEMU's replies in total.

With a limit per command only, a QEMU that replies late to each of them could delay a run for
minutes.
"""

from __future__ import annotations

import time
from typing import Final

#: The time in seconds for which this process waits at most, in total.
WAIT_SECONDS: Final = 7.0
#: The part of the past time that becomes available again, so that a process can run for days.
RECOVERY: Final = 0.1
#: The least time limit of a command in seconds.
LEAST_SECONDS: Final = 0.01


class WaitBudget:
    """The time that is left for waiting. Each pending command is a ``with`` block."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._updated = time.monotonic()
        self._pending = 0

    def _update(self) -> None:
        now = time.monotonic()
        elapsed = now - self._updated
        self._updated = now
        change = elapsed if self._pending else -RECOVERY * elapsed
        self._spent = max(0.0, self._spent + change)

    @property
    def left(self) -> float:
        """The time limit for a command that begins now, in seconds."""
        self._update()
        return max(LEAST_SECONDS, WAIT_SECONDS - self._spent)

    def __enter__(self) -> None:
        self._update()
        self._pending += 1

    def __exit__(self, *_: object) -> None:
        self._update()
        self._pending -= 1
