# SPDX-License-Identifier: GPL-2.0-or-later
"""How the account of a QEMU that prefaults by itself is read."""

from __future__ import annotations

import errno
from typing import Any

from qemu_prefault.agents import Kind, Range
from qemu_prefault.agents.qmp import _match


def told(size: int, **more: Any) -> dict[str, Any]:
    return {"size": size, "mapped": 0, "populated": 0, "absent": 0, **more}


def test_a_range_that_qemu_cut_in_two_counts_up_to_the_first_error():
    items = [Range(Kind.STAGE2, 0, 100), Range(Kind.STAGE2, 100, 50)]
    first, second = _match(
        items,
        [
            told(60, mapped=40, **{"error-number": errno.EFAULT}),
            told(40, mapped=40),
            told(50, mapped=20, absent=30),
        ],
        Kind.STAGE2,
    )
    assert (first.done, first.error) == (40, errno.EFAULT)
    assert first.left == Range(Kind.STAGE2, 40, 60)
    assert (second.done, second.error, second.left) == (50, 0, None)


def test_populating_is_told_apart_from_mapping():
    (outcome,) = _match(
        [Range(Kind.POPULATE, 0x1000, 100)], [told(100, populated=100)], Kind.POPULATE
    )
    assert outcome.done == 100 and outcome.left is None
