# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the comparison of a run's results with KVM's counters."""

from __future__ import annotations

import pytest

from qemu_prefault.engine.tally import RunTally
from qemu_prefault.host.kvm import Stage2Leaves
from qemu_prefault.qemu.memory_map import MemorySection

MIB = 1 << 20


def section(gpa: int, size: int) -> MemorySection:
    return MemorySection(
        name="ram",
        gpa=gpa,
        size=size,
        hva=0x7F0000000000 + gpa,
        offset=gpa,
        page_size=4096,
        memdev="ram",
        device=None,
        share=None,
        reserve=None,
        node=None,
        skipped=None,
        skip_code=None,
    )


@pytest.fixture
def tally() -> RunTally:
    """Make a tally of two completely prefaulted sections, of 4 MiB and of 8 MiB."""
    tally = RunTally()
    for part in (section(0, 4 * MIB), section(16 * MIB, 8 * MIB)):
        done = tally.of(part)
        done.requested = done.prefaulted = done.accounted = part.size
    return tally


def sums(tally: RunTally) -> tuple[int, int, int]:
    """Return the numbers of requested, prefaulted and accounted bytes."""
    sections = tally.tallies.values()
    return (
        sum(section.requested for section in sections),
        sum(section.prefaulted for section in sections),
        sum(section.accounted for section in sections),
    )


def test_bytes_missing_from_counters_are_unaccounted(tally: RunTally) -> None:
    tally.after = Stage2Leaves(pages_4k=256, pages_2m=1, pages_1g=0)
    tally.verify()
    assert sums(tally) == (12 * MIB, 3 * MIB, 3 * MIB)
    assert set(tally.warnings) == {"zapped"}
    assert "9.0 MiB" in tally.warnings["zapped"]


@pytest.mark.parametrize("pages_2m", [6, 7])
def test_matching_counters_change_nothing(tally: RunTally, pages_2m: int) -> None:
    tally.after = Stage2Leaves(pages_4k=0, pages_2m=pages_2m, pages_1g=0)
    tally.verify()
    assert sums(tally) == (12 * MIB,) * 3
    assert not tally.warnings


def test_missing_counters_are_warned_about(tally: RunTally) -> None:
    tally.verify()
    assert sums(tally) == (12 * MIB,) * 3
    assert set(tally.warnings) == {"no-counters"}
