# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run says it did is checked against KVM's counters."""

from __future__ import annotations

import pytest

from qemu_prefault.accounts import Accounts
from qemu_prefault.layout import Section
from qemu_prefault.report import Stage2

MIB = 1 << 20


def section(gpa: int, size: int) -> Section:
    return Section(
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
def accounts() -> Accounts:
    """Two sections, of 4 and 8 MiB, that have been prefaulted completely."""
    accounts = Accounts()
    for part in (section(0, 4 * MIB), section(16 * MIB, 8 * MIB)):
        tally = accounts.of(part)
        tally.requested = tally.prefaulted = tally.accounted = part.size
    return accounts


def sums(accounts: Accounts) -> tuple[int, int, int]:
    """Bytes requested, prefaulted and accounted for."""
    tallies = accounts.tallies.values()
    return (
        sum(tally.requested for tally in tallies),
        sum(tally.prefaulted for tally in tallies),
        sum(tally.accounted for tally in tallies),
    )


def test_what_the_counters_do_not_show_is_not_accounted_for(accounts: Accounts) -> None:
    accounts.after = Stage2(pages_4k=256, pages_2m=1, pages_1g=0)
    accounts.verify()
    assert sums(accounts) == (12 * MIB, 3 * MIB, 3 * MIB)
    assert set(accounts.caveats) == {"zapped"}
    assert "9.0 MiB" in accounts.caveats["zapped"]


@pytest.mark.parametrize("pages_2m", [6, 7])
def test_counters_that_show_it_all_change_nothing(accounts: Accounts, pages_2m: int) -> None:
    accounts.after = Stage2(pages_4k=0, pages_2m=pages_2m, pages_1g=0)
    accounts.verify()
    assert sums(accounts) == (12 * MIB,) * 3
    assert not accounts.caveats


def test_without_counters_there_is_a_warning(accounts: Accounts) -> None:
    accounts.verify()
    assert sums(accounts) == (12 * MIB,) * 3
    assert set(accounts.caveats) == {"no-counters"}
