# SPDX-License-Identifier: GPL-2.0-or-later
"""All measurements; writes docs/benchmarks.md. Called by ``make bench``.

The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qemu_prefault.lab import open_machine
from qemu_prefault.lab.image import compile_static

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "docs" / "benchmarks.md"
PYTHON = sys.executable
TOOL = [PYTHON, "-m", "qemu_prefault"]
REPETITIONS = 10
GUEST_MIB = (256, 1024, 4096, 16384)
# Tells the peak of this very program; ru_maxrss also counts what the process was before exec.
MEASURED_TOOL = """
import atexit, sys
def peak():
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(peak)
from qemu_prefault.__main__ import main
main()
"""


def log(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


@contextmanager
def qemu(mib: int) -> Iterator[str]:
    """A stopped QEMU on this machine, no KVM needed; its memory is not touched. Its socket."""
    with tempfile.TemporaryDirectory() as scratch:
        socket = f"{scratch}/qmp"
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-accel", "tcg",
             "-m", str(mib), "-qmp", f"unix:{socket},server=on,wait=off"],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while not os.path.exists(socket) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield socket
        finally:
            process.kill()
            process.wait()


def wall(argv: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - started


def compare(argv: Sequence[str], base: Sequence[str]) -> tuple[float, float, float]:
    """Median seconds of both, taken in turns, and their ratio."""
    wall(argv), wall(base)  # into the page cache
    pairs = [(wall(argv), wall(base)) for _ in range(REPETITIONS)]
    one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return one, other, one / other


def peak_kib(*arguments: str) -> int:
    result = subprocess.run(
        [PYTHON, "-c", MEASURED_TOOL, *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return int(next(x for x in result.stderr.splitlines() if x.startswith("VmHWM")).split()[1])


def on_this_machine() -> dict[str, Any]:
    log("start-up times")
    with qemu(256) as socket:
        dry = [*TOOL, "--qmp", socket, "--populate-only", "--dry-run"]
        found: dict[str, Any] = {
            "dry": compare(dry, [PYTHON, "-c", "import asyncio, click"]),
            "help": compare([*TOOL, "--help"], [PYTHON, "-c", "import click"]),
            "memory": [],
        }
    for mib in GUEST_MIB:
        log(f"memory of the tool, guest of {mib} MiB")
        with qemu(mib) as socket:
            common = ("--qmp", socket, "--populate-only")
            found["memory"].append(
                (mib, peak_kib(*common, "--dry-run"), peak_kib(*common, "--range", "0+128M"))
            )
    return found


def where_the_kvm_is() -> dict[str, Any]:
    wheels = [Path(wheel) for wheel in os.environ["QEMU_PREFAULT_WHEELS"].split()]
    loop = compile_static(HERE / "loop.c")
    with open_machine() as machine:
        log("in the lab: this takes a few minutes")
        machine.install(wheels)
        machine.put(loop, "/root/bench/loop")
        machine.put(HERE / "inside.py", "/root/bench/inside.py")
        result = machine.run(["python3", "/root/bench/inside.py", "/root/bench/loop"], timeout=3600)
        version = machine.run(["qemu-system-x86_64", "--version"]).text.split()[3]
    return {**json.loads(result.text.splitlines()[-1]), "qemu": version}


def median(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def report(host: dict[str, Any], lab: dict[str, Any]) -> tuple[str, list[str]]:
    """The text of docs/benchmarks.md, and the bars that were missed."""
    nothing, tool = lab["restore"]["nothing"], lab["restore"]["qemu-prefault"]
    share = 100 * median(tool, "faults") / median(nothing, "faults")
    slow = [row["first"] / row["steady"] for row in nothing]
    fast = [row["first"] / row["steady"] for row in tool]
    ratios = [pair["tool"] / pair["loop"] for pair in lab["loop"]]
    peaks = [max(row[1:]) for row in host["memory"]]
    growth = (max(peaks) - min(peaks)) / 1024
    repeated = lab["repeated"]
    rows = [
        ("stage-2 faults of the first pass over 256 MiB after a restore, share of the "
         "unprefaulted run", f"{share:.3f} %", "<= 0.1 %", share <= 0.1),
        ("first pass / steady pass after prefault", f"{statistics.median(fast):.2f}", "<= 1.5",
         statistics.median(fast) <= 1.5),
        ("`seconds.prefault` / bare C loop, 1 GiB of 4K pages, one vCPU",
         f"{statistics.median(ratios):.3f}", "<= 1.1", statistics.median(ratios) <= 1.1),
        ("`--dry-run` / `python -c 'import asyncio, click'`", f"{host['dry'][2]:.2f}", "<= 3",
         host["dry"][2] <= 3),
        ("`--help` / `python -c 'import click'`", f"{host['help'][2]:.2f}", "<= 2",
         host["help"][2] <= 2),
        ("the tool's peak memory, guest of 256 MiB to 16 GiB", f"+{growth:.1f} MiB", "flat (2 MiB)",
         growth <= 2),
    ]  # fmt: skip
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. The guest's part ran on kernel "
        f"{lab['kernel']}, QEMU {lab['qemu']}, in the nested lab unless this machine's own KVM "
        "can prefault. There the counts are exact; seconds compare only within one table.",
        "",
        "| what | measured | bar | |",
        "|---|--:|--:|---|",
        *(f"| {what} | {got} | {bar} | {'met' if ok else '**missed**'} |"
          for what, got, bar, ok in rows),
        "",
        "## First pass after a restore",
        "",
        f"A guest that has written 256 MiB, restored on 4K pages; medians of {len(tool)}, taken "
        "in turns.",
        "",
        "| before the guest goes on | stage-2 faults | first pass s | steady pass s | ratio | "
        "populate s | prefault s |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| nothing | {median(nothing, 'faults'):,.0f} | {median(nothing, 'first'):.3f} | "
        f"{median(nothing, 'steady'):.3f} | {statistics.median(slow):.0f} | | |",
        f"| qemu-prefault | {median(tool, 'faults'):,.0f} | {median(tool, 'first'):.3f} | "
        f"{median(tool, 'steady'):.3f} | {statistics.median(fast):.2f} | "
        f"{median(tool, 'populate'):.3f} | {median(tool, 'prefault'):.3f} |",
        "",
        "## Against a bare loop",
        "",
        "`tests/bench/loop.c` issues the same chunks of 32 MiB from its own thread. Seconds per "
        "GiB of 4K pages, one vCPU, in pairs taken in changing order:",
        "",
        "| qemu-prefault | loop | ratio |",
        "|--:|--:|--:|",
        *(f"| {p['tool']:.3f} | {p['loop']:.3f} | {p['tool'] / p['loop']:.3f} |"
          for p in lab["loop"]),
        "",
        f"Fastest of each: {min(p['tool'] for p in lab['loop']):.3f} and "
        f"{min(p['loop'] for p in lab['loop']):.3f}, ratio "
        f"{min(p['tool'] for p in lab['loop']) / min(p['loop'] for p in lab['loop']):.3f}. "
        "The lab has one CPU, so what the tool does beside the loop counts against it, the more "
        "so on a busy host.",
        "",
        "## Everything else the tool does",
        "",
        "Inside the lab, on a restored guest of 352 MiB; `total` is without Python's start:",
        "",
        "| run | populate s | prefault s | total s |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {s['populate']:.3f} | {s['prefault']:.3f} | {s['total']:.3f} |"
          for name, s in repeated.items()),
        "",
        f"On this machine, wall time, medians of {REPETITIONS}:",
        "",
        "| command | s | compared with | s |",
        "|---|--:|---|--:|",
        f"| `--populate-only --dry-run` | {host['dry'][0]:.3f} | `import asyncio, click` | "
        f"{host['dry'][1]:.3f} |",
        f"| `--help` | {host['help'][0]:.3f} | `import click` | {host['help'][1]:.3f} |",
        "",
        "## Memory of the tool",
        "",
        "Peak resident set (VmHWM) on this machine, sparse guests, `--populate-only`:",
        "",
        "| guest | `--dry-run` over all of it | `--range 0+128M` |",
        "|--:|--:|--:|",
        *(f"| {mib} MiB | {dry / 1024:.1f} MiB | {ranged / 1024:.1f} MiB |"
          for mib, dry, ranged in host["memory"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n", [what for what, _, _, ok in rows if not ok]


def main() -> int:
    text, missed = report(on_this_machine(), where_the_kvm_is())
    TARGET.write_text(text)
    print(text)
    for what in missed:
        log(f"bar missed: {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
