# SPDX-License-Identifier: GPL-2.0-or-later
"""List the failures of an avocado job, and format the figures of its tests.

This module reads the results from the job's ``results.json``.

This project's tests write their figures to their whiteboards, as a JSON list of rows. A whiteboard
is free text, so other tests may write any text. For example, avocado-vt writes QEMU's and KVM's
versions as a Python dict. An interrupted test writes nothing. Such whiteboards contain no rows and
are not an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENDINGS = {"PASS": "passed", "WARN": "passed", "CANCEL": "skipped", "SKIP": "skipped"}
# The fields of a row and their types, as written by guests.py and vt/prefault_vt.py.
_DISTRO_ROW = {
    **dict.fromkeys(("distro", "moment", "machine", "backing", "firmware", "pages"), str),
    "smp": int,
    "with": dict,
}
_VT_ROW = {"moment": str, "with": int}
_SAMPLE = {"seconds": (int, float), "faults": int, "emulated": int}

Row = dict[str, Any]


def summarize(results: Path) -> tuple[list[str], Counter[str]]:
    """Return the summary's lines, and the counts of passed, failed and skipped tests."""
    counts = Counter[str]()
    try:
        job = json.loads((results / "results.json").read_text())
    except FileNotFoundError:
        counts["failed"] += 1
        return [f"avocado ran no test: {results} contains no results.json", ""], counts
    rows: list[Row] = []
    lines = []
    for test in job["tests"]:
        ending = ENDINGS.get(test["status"], "failed")
        counts[ending] += 1
        if ending != "passed":
            lines.append(f"{test['status']}: {test['id']}: {test['fail_reason']}")
        if test["status"] == "PASS":
            rows += rows_of(test)
    if distros := [row for row in rows if "distro" in row]:
        lines += ["", *distro_table(distros)]
    elif rows:
        lines += ["", *vt_table(job["tests"])]
    return [*lines, "", f"results: {results}/results.html", ""], counts


def rows_of(test: dict[str, Any]) -> list[Row]:
    """Return a whiteboard's rows, or an empty list if it contains other text."""
    try:
        found = json.loads(test["whiteboard"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [row for row in found if _is_row(row)] if isinstance(found, list) else []


def _is_row(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    if _has(row, _DISTRO_ROW):
        samples = [row["with"], row.get("without") or row["with"]]
        return all(isinstance(sample, dict) and _has(sample, _SAMPLE) for sample in samples)
    return _has(row, _VT_ROW) and isinstance(row.get("without"), int | None)


def _has(found: Row, fields: dict[str, Any]) -> bool:
    return all(isinstance(found.get(name), kind) for name, kind in fields.items())


def distro_table(rows: Sequence[Row]) -> list[str]:
    """Format the rows that distro.py or cloud.py wrote as a Markdown table."""
    lines = [
        "| distribution | machine | event | seconds, without | with | faults on memory, without "
        "| with | device accesses, without | with |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        machine = [row["machine"].partition(",")[0]]
        machine += [row["backing"]] if row["backing"] != "ram" else []
        machine += ["OVMF"] if row["firmware"] == "ovmf" else []
        machine += ["THP"] if row["pages"] != "never" else []
        machine += [f"{row['smp']} vCPUs"] if row["smp"] > 1 else []
        cells = [row["distro"], ", ".join(machine), row["moment"]]
        for part in ("seconds", "memory", "emulated"):
            for which in ("without", "with"):
                cells.append(_figure(row.get(which), part))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def vt_table(tests: Sequence[dict[str, Any]]) -> list[str]:
    """Format avocado-vt's results as a Markdown table with one line per test."""
    lines = [
        "| test | seconds | measured | faults on memory, without | with |",
        "|---|--:|---|--:|--:|",
    ]
    for test in tests:
        for row in rows_of(test) or [{}]:
            faults = [
                "" if (n := row.get(key)) is None else f"{n:,}" for key in ("without", "with")
            ]
            name = test["name"].removeprefix("type_specific.").partition(";")[0]
            cells = [name, f"{test['time_elapsed']:.0f}", row.get("moment", ""), *faults]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _figure(sample: dict[str, Any] | None, part: str) -> str:
    if not sample:
        return ""
    if part == "seconds":
        return f"{sample['seconds']:.1f}"
    return (
        f"{sample['emulated'] if part == 'emulated' else sample['faults'] - sample['emulated']:,}"
    )
