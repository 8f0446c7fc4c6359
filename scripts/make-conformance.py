# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the conformance suite on three kernels, and write docs/conformance.md.

The suite runs in three modes of KVM on each kernel.

    make conformance                                     run the suite in the lab (10 minutes)
    scripts/make-conformance.py --keep DIR               run the suite; keep each run's JSON in DIR
    scripts/make-conformance.py --keep DIR --render      write the page from the JSON in DIR

scripts/conformance.md.in contains the text around the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "scripts" / "conformance.md.in"
TARGET = ROOT / "docs" / "conformance.md"

VARIANTS = ("bookworm", "trixie", "sid")
MODES = {
    "npt=1": (),
    "tdp_mmu=0": ("--no-tdp-mmu",),
    "npt=0": ("--no-npt",),
}
SIGNS = {"pass": "✓", "differs": "≠", "refused": "r", "known bad": "B", "skip": "·",
         "FAIL": "**F**", "HANG": "**H**"}  # fmt: skip
Runs = dict[tuple[str, str], dict[str, Any]]


def run(variant: str, mode: str) -> dict[str, Any]:
    """Run the conformance suite in the lab, and return its report.

    The report's ``with_lab`` is the duration in seconds, including the start of the lab.
    """
    command = [sys.executable, "-m", "qemu_prefault_lab", "run", "--variant", variant, "--nested"]
    command += MODES[mode]
    for wheel in os.environ.get("QEMU_PREFAULT_WHEELS", "").split():
        command += ["--wheel", wheel]
    command += ["--timeout", "900", "--"]
    command += ["python3", "-m", "qemu_prefault_lab.conformance", "--harsh", "--json"]
    started = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not result.stdout.strip():
        sys.exit(
            f"{variant}, {mode}: the run exited with status {result.returncode} and printed no "
            "report"
        )
    report: dict[str, Any] = json.loads(result.stdout)
    report["with_lab"] = round(time.monotonic() - started, 1)
    return report


def rows(table: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| " + " | ".join(table[0]) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(table[0]) - 1)) + "|"
    for row in table[1:]:
        yield "| " + " | ".join(row) + " |"


def short(kernel: str) -> str:
    """Return the first two numbers of a kernel release."""
    return ".".join(kernel.split("-", maxsplit=1)[0].split("+", maxsplit=1)[0].split(".")[:2])


def summary(runs: Runs) -> Iterator[str]:
    """Yield a table of the runs, with the number of cases per outcome."""
    head = ["kernel", "mode", "ioctl offered", "cases", "✓", "≠", "r", "B", "·", "F, H", "seconds",
            "with the lab"]  # fmt: skip
    table = [head]
    for (_, mode), report in runs.items():
        counts = report["counts"]
        ran = sum(counts.values()) - counts["skip"]
        row = [report["host"]["kernel"], f"`{mode}`"]
        row.append("yes" if report["host"]["capability"] else "no")
        row.append(f"{ran} of {len(report['cases'])}")
        row += [str(counts[key]) for key in ("pass", "differs", "refused", "known bad", "skip")]
        row += [str(counts["FAIL"] + counts["HANG"]), f"{report['seconds']:.0f}"]
        table.append([*row, f"{report['with_lab']:.0f}"])
    return rows(table)


def observed(runs: Runs) -> Iterator[str]:
    """Yield a table of the observations that differ between runs."""
    answers: dict[str, dict[str, list[str]]] = {}
    for (_, mode), report in runs.items():
        for case in report["cases"]:
            if case["outcome"] == "differs":
                name = f"{short(report['host']['kernel'])} `{mode}`"
                answers.setdefault(case["id"], {}).setdefault(case["text"], []).append(name)
    yield "| case | observed | on |"
    yield "|---|---|---|"
    for name, seen in answers.items():
        for text, where in seen.items():
            yield f"| `{name}` | {text} | {', '.join(where)} |"


def bugs(runs: Runs) -> Iterator[str]:
    """Yield a list of the known bugs that each run detected."""
    for (_, mode), report in runs.items():
        names = [case["id"] for case in report["cases"] if case["outcome"] == "known bad"]
        if names:
            kernel = short(report["host"]["kernel"])
            yield f"- {kernel} `{mode}`: " + ", ".join(f"`{name}`" for name in names)


def skips(runs: Runs) -> Iterator[str]:
    """Yield a list of the cases that no run could execute, with the reasons."""
    reasons: dict[str, set[str]] = {}
    ran = set()
    for report in runs.values():
        for case in report["cases"]:
            if case["outcome"] == "skip":
                reasons.setdefault(case["id"], set()).add(case["text"])
            else:
                ran.add(case["id"])
    for name, why in reasons.items():
        if name not in ran:
            yield f"- `{name}`: {'; '.join(sorted(why))}"


def matrix(runs: Runs) -> Iterator[str]:
    """Yield a table of outcomes per area, with one column per run."""
    first = next(iter(runs.values()))
    area = ""
    head = [f"{short(r['host']['kernel'])} {mode}" for (_, mode), r in runs.items()]
    outcomes = {
        key: {case["id"]: SIGNS[case["outcome"]] for case in report["cases"]}
        for key, report in runs.items()
    }
    for case in first["cases"]:
        if case["id"].partition("/")[0] != area:
            area = case["id"].partition("/")[0]
            yield from ("", f"### {area}", "")
            yield f"| case | {' | '.join(head)} | statement |"
            yield "|---|" + ":-:|" * len(head) + "---|"
        signs = " | ".join(outcomes[key].get(case["id"], "") for key in runs)
        yield f"| `{case['id'].partition('/')[2]}` | {signs} | {case['says']} |"


def page(runs: Runs) -> str:
    """Return the text of docs/conformance.md."""
    text = TEMPLATE.read_text()
    for name, part in (
        ("SUMMARY", summary), ("OBSERVED", observed), ("BUGS", bugs), ("SKIPS", skips),
        ("MATRIX", matrix),
    ):  # fmt: skip
        text = text.replace(f"@{name}@", "\n".join(part(runs)).strip())
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/conformance.md.")
    parser.add_argument("--keep", type=Path, help="directory for the JSON of each run")
    parser.add_argument(
        "--render",
        action="store_true",
        help="read the JSON in the --keep directory instead of running the suite",
    )
    options = parser.parse_args()
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(exist_ok=True)
        for variant in VARIANTS:
            for mode in MODES:
                file = directory / f"{variant}-{mode}.json"
                if not options.render:
                    print(f"{variant}, {mode}", file=sys.stderr, flush=True)
                    file.write_text(json.dumps(run(variant, mode)))
                runs[variant, mode] = json.loads(file.read_text())
    TARGET.write_text(page(runs))
    bad = [
        f"{variant}, {mode}: {case['id']}: {case['text']}"
        for (variant, mode), report in runs.items()
        for case in report["cases"]
        if case["outcome"] in ("FAIL", "HANG")
    ]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
