# SPDX-License-Identifier: GPL-2.0-or-later
"""Wait for another process."""

from __future__ import annotations

import time
from collections.abc import Callable

from qemu_prefault.agents import Limits

GRACE = Limits().dead_man + 9
"""Seconds until helpers have left whatever happened: the dead man's time, and a busy host's."""


def wait_for(condition: Callable[[], object], what: str, limit: float = GRACE) -> float:
    """Wait for a state of another process that offers no event; give the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started
