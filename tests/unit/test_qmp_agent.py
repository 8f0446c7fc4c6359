# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool interprets the results of the patched QEMU's prefault job."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

from qemu_prefault.agents.base import Kind, Range
from qemu_prefault.agents.qmp import JOB_PREFIX, _match, is_orphan


def told(size: int, **more: Any) -> dict[str, Any]:
    return {"size": size, "mapped": 0, "populated": 0, "absent": 0, **more}


def test_split_range_counts_up_to_first_error() -> None:
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


def test_populate_differs_from_map() -> None:
    (outcome,) = _match(
        [Range(Kind.POPULATE, 0x1000, 100)], [told(100, populated=100)], Kind.POPULATE
    )
    assert outcome.done == 100 and outcome.left is None


def test_job_of_a_dead_process_is_an_orphan() -> None:
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert is_orphan(f"{JOB_PREFIX}{namespace}-{process.pid}-0")
        assert not is_orphan(f"{JOB_PREFIX}{namespace}-{os.getpid()}-0")
        # A job from another PID namespace may still have an owner.
        assert not is_orphan(f"{JOB_PREFIX}{namespace + 1}-{process.pid}-0")
        assert not is_orphan(f"backup-{namespace}-{process.pid}-0")
