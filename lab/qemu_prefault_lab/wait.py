# SPDX-License-Identifier: GPL-2.0-or-later
"""Wait for another process."""

from __future__ import annotations

import time
from collections.abc import Callable

from qemu_prefault.agents.base import Limits

#: Seconds after which helpers have left in any case: their dead man's time and a margin.
GRACE = Limits().dead_man + 9


def wait_for(condition: Callable[[], object], what: str, limit: float = GRACE) -> float:
    """Poll a condition of another process until it holds, and return the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started
