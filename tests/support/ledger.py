# SPDX-License-Identifier: GPL-2.0-or-later
"""A ledger for a long test, from which an interrupted run can resume.

The ledger contains one line of JSON for each iteration.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Ledger:
    """The recorded iterations of one seed.

    :param path: The ledger's file, or None for no file. If the file exists, its entries for this
        seed are read. The file can also be the saved output of tests/run.py, whose lines have a
        prefix.
    """

    def __init__(self, path: Path | None, seed: int) -> None:
        self._path = path
        self.entries: dict[int, Entry] = {}
        if path is not None and path.exists():
            for line in path.read_text(errors="replace").splitlines():
                entry = parse_entry(line)
                if entry is not None and entry["seed"] == seed:
                    self.entries[entry["iteration"]] = entry

    def has(self, iteration: int) -> bool:
        """Return whether an iteration has completed without a fault."""
        return iteration in self.entries and not self.entries[iteration]["fault"]

    def add(self, entry: Entry) -> str:
        """Write an entry to the file, and return its line."""
        self.entries[entry["iteration"]] = entry
        line = json.dumps(entry)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")
        return line

    def seconds(self) -> float:
        """Return the total time of all iterations."""
        return sum(float(entry["seconds"]) for entry in self.entries.values())

    def summary(self) -> str:
        """Return the number of iterations per outcome, and the longest gaps."""
        entries = list(self.entries.values())
        lines = [f"{len(entries)} iterations, {self.seconds():.0f} s"]
        outcomes = Counter(
            f"{entry['draw']['action']}: {', '.join(entry['outcomes'])}" for entry in entries
        )
        lines += [f"{count:5}  {name}" for name, count in sorted(outcomes.items())]
        for note, count in Counter(note for entry in entries for note in entry["notes"]).items():
            lines.append(f"{count:5}  note: {note}")
        gaps = [e for e in entries if e["guest_gap"] is not None and e["control_gap"] is not None]
        if gaps:
            guest, control = (max(e[k] for e in gaps) for k in ("guest_gap", "control_gap"))
            beyond = [e["iteration"] for e in gaps if e["guest_gap"] > e["control_gap"] + 0.1]
            lines.append(f"longest gaps: guest {guest:.3f} s, control {control:.3f} s")
            lines.append(
                f"more than 0.1 s longer than the control's: {len(beyond)} of {len(gaps)} {beyond}"
            )
        faults = {e["iteration"]: e["fault"] for e in entries if e["fault"]}
        lines += [f"FAULT in iteration {number}: {fault}" for number, fault in faults.items()]
        return "\n".join(lines)


def parse_entry(line: str) -> Entry | None:
    """Return the entry in a line, or None if the line contains no entry."""
    at = line.find('{"seed": ')
    if at < 0:
        return None
    try:
        entry: Entry = json.loads(line[at:])
    except ValueError:  # the line is incomplete
        return None
    return entry
