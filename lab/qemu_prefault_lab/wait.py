# SPDX-License-Identifier: GPL-2.0-or-later
"""Wait for a condition in another process."""

from __future__ import annotations

import time
from collections.abc import Callable

from qemu_prefault.agents.base import Limits

#: Seconds after which a killed tool's helpers have exited: Limits.dead_man plus a margin.
GRACE = Limits().dead_man + 9


def wait_for(condition: Callable[[], object], what: str, limit: float = GRACE) -> float:
    """Poll until a condition holds, and return the elapsed time in seconds.

    :raises AssertionError: If the condition does not hold within ``limit`` seconds.
    """
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"timed out after {limit:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started
