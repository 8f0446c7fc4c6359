# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure restored guests, and compare the tool with a loop of bare ioctls.

    restore.py LOOP

The script needs KVM, so run.py runs the script in the lab or on a host that can prefault. The last
line of output is the results as JSON. LOOP is a program that only issues the ioctl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.scenario import NOTHING, TOOL, DemoCase, measure, small_pages

ROUNDS, PAIRS = 5, 9
LOOP_MIB, CHUNK_MIB = 1024, 32


def run_tool(guest: Guest, *arguments: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "qemu_prefault", "--qmp", str(guest.qmp_path), "--json"]
    result = subprocess.run([*argv, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def after_restore(state: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the faults and durations of restored guests, without and with the tool.

    Durations are in seconds.
    """
    measure(DemoCase("boot", TOOL), 0, state)  # saves the guest's state
    found: dict[str, list[dict[str, Any]]] = {NOTHING: [], TOOL: []}
    for _ in range(ROUNDS):
        for way, rows in found.items():
            result = measure(DemoCase("restore", way), 0, state)
            rows.append(
                {
                    "faults": result.faults,
                    "first": result.first_pass,
                    "steady": result.steady_pass,
                    "populate": result.spent.populate,
                    "prefault": result.spent.prefault,
                }
            )
    return found


def compare_with_loop(program: str) -> list[dict[str, float]]:
    """Return pairs of durations, in seconds per GiB, for the tool and the loop.

    :param program: The path of the program with the loop.
    """
    pairs: list[dict[str, float]] = []
    with small_pages():
        loop = subprocess.Popen(
            [program, str(LOOP_MIB), str(CHUNK_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert loop.stdin and loop.stdout
    for number in range(PAIRS):
        with small_pages():
            guest = Guest(machine="microvm", memory_mib=LOOP_MIB, paused=True)
        with guest:
            # Populate the memory first, because the loop also starts with populated memory.
            run_tool(guest, "--populate-only")
            order = ("loop", "tool") if number % 2 else ("tool", "loop")
            pair: dict[str, float] = {}
            for who in order:
                if who == "tool":
                    report = run_tool(guest)
                    gib = report["bytes"]["prefaulted"] / (1 << 30)
                    pair[who] = report["seconds"]["prefault"] / gib
                else:
                    loop.stdin.write("\n")
                    loop.stdin.flush()
                    pair[who] = float(loop.stdout.readline()) / (LOOP_MIB / 1024)
            pairs.append(pair)
    loop.stdin.close()
    loop.wait()
    return pairs


def repeated(state: Path) -> dict[str, dict[str, float]]:
    """Measure the durations of a dry run, a first run and a second run on one guest.

    The durations are in seconds. The dry run and the second run show the tool's overhead.
    """
    with small_pages():
        guest = Guest(machine="microvm", memory_mib=352, incoming=state, paused=True)
    with guest:
        guest.wait_restored()
        return {
            name: run_tool(guest, *arguments)["seconds"]
            for name, arguments in (("dry", ["--dry-run"]), ("first", []), ("second", []))
        }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / "state"
        results = {
            "loop": compare_with_loop(sys.argv[1]),
            "restore": after_restore(state),
            "repeated": repeated(state),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
