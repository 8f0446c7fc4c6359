# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the conformance suite in the lab, and write docs/conformance.md.

On an emulated AMD CPU, the suite runs on three kernels, in three modes of KVM each. On an emulated
Intel CPU, it runs on two kernels, in seven modes each.

    make conformance                                     run the suite in the lab (40 minutes)
    scripts/make-conformance.py --keep DIR               run the suite; keep each run's JSON in DIR
    scripts/make-conformance.py --keep DIR --run VARIANT replace the JSON of this variant's runs
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

NPT_MODES = {
    "npt=1": (),
    "tdp_mmu=0": ("--no-tdp-mmu",),
    "npt=0": ("--no-npt",),
}
EPT_MODES = {
    "ept=1": (),
    "ept=1 enable_apicv=0": ("--module-parameter", "kvm_intel.enable_apicv=0"),
    "ept=1 pml=0": ("--module-parameter", "kvm_intel.pml=0"),
    "ept=1 eptad=0": ("--module-parameter", "kvm_intel.eptad=0"),
    "ept=1 nx_huge_pages=force": ("--module-parameter", "kvm.nx_huge_pages=force"),
    "ept=1 tdp_mmu=0": ("--no-tdp-mmu",),
    "ept=0": ("--no-npt",),
}
MODES = {
    "bookworm": NPT_MODES,
    "trixie": NPT_MODES,
    "sid": NPT_MODES,
    "ept": EPT_MODES,
    "ept-sid": EPT_MODES,
}
#: The variants with EPT, and the variants with NPT that run the same kernel.
SAME_KERNEL = {"ept": "trixie", "ept-sid": "sid"}
#: A table row names at most this number of cases.
NAMED_CASES = 8
SIGNS = {"pass": "✓", "differs": "≠", "refused": "r", "known bad": "B", "skip": "·",
         "FAIL": "**F**", "HANG": "**H**"}  # fmt: skip
Runs = dict[tuple[str, str], dict[str, Any]]


def run(variant: str, mode: str) -> dict[str, Any]:
    """Run the conformance suite in the lab, and return its report.

    The report's ``with_lab`` is the duration in seconds, including the start of the lab.
    """
    command = [sys.executable, "-m", "qemu_prefault_lab", "run", "--variant", variant, "--nested"]
    command += MODES[variant][mode]
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


def on_npt(runs: Runs) -> Runs:
    """Return the runs on the emulated AMD CPU."""
    return {key: report for key, report in runs.items() if key[0] not in SAME_KERNEL}


def counterpart(variant: str, mode: str) -> tuple[str, str]:
    """Return the run on NPT with which a run on EPT is compared."""
    other = {"ept=0": "npt=0", "ept=1 tdp_mmu=0": "tdp_mmu=0"}.get(mode, "npt=1")
    return SAME_KERNEL[variant], other


def label(runs: Runs, key: tuple[str, str]) -> str:
    """Return the kernel and the mode of a run, as the tables show them."""
    return f"{short(runs[key]['host']['kernel'])} `{key[1]}`"


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
    """Yield a table of the observations that differ between runs on NPT."""
    answers: dict[str, dict[str, list[str]]] = {}
    for key, report in on_npt(runs).items():
        for case in report["cases"]:
            if case["outcome"] == "differs":
                seen = answers.setdefault(case["id"], {}).setdefault(case["text"], [])
                seen.append(label(runs, key))
    yield "| case | observed | on |"
    yield "|---|---|---|"
    for name, texts in answers.items():
        for text, where in texts.items():
            yield f"| `{name}` | {text} | {', '.join(where)} |"


def bugs(runs: Runs) -> Iterator[str]:
    """Yield a list of the known bugs that each run on NPT detected."""
    for key, report in on_npt(runs).items():
        names = [case["id"] for case in report["cases"] if case["outcome"] == "known bad"]
        if names:
            yield f"- {label(runs, key)}: " + ", ".join(f"`{name}`" for name in names)


def result_of(case: dict[str, Any]) -> str:
    """Return what the table of differences shows for a case."""
    sign = SIGNS[case["outcome"]]
    return f"{sign} {case['text']}" if case["outcome"] in ("differs", "FAIL", "HANG") else sign


def differences(runs: Runs) -> Iterator[str]:
    """Yield a table of the cases whose results on EPT and NPT differ.

    Cases with the same results in the same runs share a row.
    """
    where: dict[tuple[str, str, str], list[str]] = {}
    for key, report in runs.items():
        if key[0] not in SAME_KERNEL:
            continue
        others = {case["id"]: case for case in runs[counterpart(*key)]["cases"]}
        for case in report["cases"]:
            results = result_of(others[case["id"]]), result_of(case)
            if results[0] != results[1]:
                where.setdefault((case["id"], *results), []).append(label(runs, key))
    shared: dict[tuple[str, str, str], list[str]] = {}
    for (name, npt, ept), labels in where.items():
        shared.setdefault((npt, ept, ", ".join(labels)), []).append(f"`{name}`")
    yield "| case | NPT | EPT | on |"
    yield "|---|---|---|---|"
    for (npt, ept, on), names in shared.items():
        text = ", ".join(names) if len(names) <= NAMED_CASES else f"{len(names)} cases"
        yield f"| {text} | {npt} | {ept} | {on} |"


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
    """Yield a table of outcomes per area, with one column per run.

    The table omits the runs on EPT in which all outcomes are as with ``ept=1``.
    """
    first = next(iter(runs.values()))
    area = ""
    outcomes = {
        key: {case["id"]: SIGNS[case["outcome"]] for case in report["cases"]}
        for key, report in runs.items()
    }
    outcomes = {
        key: signs
        for key, signs in outcomes.items()
        if key[0] not in SAME_KERNEL or key[1] == "ept=1" or signs != outcomes[key[0], "ept=1"]
    }
    head = [f"{short(runs[key]['host']['kernel'])} {key[1]}" for key in outcomes]
    for case in first["cases"]:
        if case["id"].partition("/")[0] != area:
            area = case["id"].partition("/")[0]
            yield from ("", f"### {area}", "")
            yield f"| case | {' | '.join(head)} | statement |"
            yield "|---|" + ":-:|" * len(head) + "---|"
        signs = " | ".join(column.get(case["id"], "") for column in outcomes.values())
        yield f"| `{case['id'].partition('/')[2]}` | {signs} | {case['says']} |"


def page(runs: Runs) -> str:
    """Return the text of docs/conformance.md."""
    text = TEMPLATE.read_text()
    for name, part in (
        ("SUMMARY", summary), ("OBSERVED", observed), ("BUGS", bugs), ("SKIPS", skips),
        ("DIFFERENCES", differences), ("MATRIX", matrix),
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
    parser.add_argument(
        "--run",
        action="append",
        choices=list(MODES),
        help="run the suite only in this variant, and read the results of the other variants from "
        "the --keep directory",
    )
    options = parser.parse_args()
    if (options.render or options.run) and not options.keep:
        parser.error("--render and --run need --keep")
    variants = [] if options.render else options.run or list(MODES)
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(exist_ok=True)
        for variant, modes in MODES.items():
            for mode in modes:
                file = directory / f"{variant}-{mode.replace(' ', '-')}.json"
                if variant in variants:
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
