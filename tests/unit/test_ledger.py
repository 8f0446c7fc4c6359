# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the ledger of a soak (tests/support/ledger.py)."""

from __future__ import annotations

from pathlib import Path

from support.ledger import Entry, Ledger


def entry(iteration: int, fault: str = "", guest_gap: float | None = None) -> Entry:
    return {
        "seed": 7,
        "iteration": iteration,
        "draw": {"action": "kill"},
        "outcomes": ["killed"],
        "notes": [],
        "seconds": 1.5,
        "guest_gap": guest_gap,
        "control_gap": 0.1,
        "fault": fault,
    }


def test_completed_iterations_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    first = Ledger(path, 7)
    first.add(entry(0))
    first.add(entry(1, fault="the guest is lost"))
    again = Ledger(path, 7)
    assert [again.has(number) for number in range(3)] == [True, False, False]
    assert again.seconds() == 3.0
    assert Ledger(path, 8).entries == {}


def test_output_of_a_run_is_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "output"
    line = Ledger(None, 7).add(entry(4))
    path.write_text(f"   soak-1 | starts\n   soak-1 | {line}\n   soak-1 | {line[:50]}\n")
    assert Ledger(path, 7).entries == {4: entry(4)}


def test_summary_names_gaps_and_faults() -> None:
    ledger = Ledger(None, 7)
    for number, gap in enumerate((0.15, 0.25, None)):
        ledger.add(entry(number, guest_gap=gap))
    ledger.add(entry(3, fault="the guest is lost"))
    text = ledger.summary()
    assert "4  kill: killed" in text
    assert "1 of 2 [1]" in text
    assert "FAULT in iteration 3: the guest is lost" in text
