# SPDX-License-Identifier: GPL-2.0-or-later
"""Show the effect of prefaulting on any x86-64 Linux (``qemu-prefault demo``).

If this host's KVM can prefault, the demo runs :mod:`qemu_prefault_lab.scenario` on this host.
Otherwise it runs the scenario in the nested lab. The demo displays the scenario's events while the
scenario runs, and a table at the end.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from qemu_prefault.cli.format import table
from qemu_prefault.engine.report import SCHEMA
from qemu_prefault.errors import FailedError

from .emulated import EmulatedMachine
from .launch import open_machine
from .scenario import CASES, WORKLOAD_MIB

LIMIT_SECONDS = 1800.0
_MMU = {"ept": "EPT", "npt": "NPT", "shadow": "shadow paging"}
HEADERS = ["guest", "method", "stage-2 faults", "first pass s", "steady pass s", "prefaulting s"]


class LiveTable:
    """The demo's table of results, which is updated while the demo runs.

    On a terminal, this class redraws the whole table. Otherwise it prints each row when the row is
    complete, and the current row every five seconds.
    """

    def __init__(self) -> None:
        self.machine: dict[str, str] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.error: dict[str, str] = {}
        self._steps = [""] * len(CASES)
        self._faults = [0] * len(CASES)
        self._live = sys.stderr.isatty()
        self._drawn = 0
        self._said = 0.0
        self._rest = b""

    def feed(self, fd: int, data: bytes) -> None:
        """Process the events in the scenario's output."""
        if fd != 1:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        row = event.pop("row", 0)
        if kind == "machine":
            self.machine = event
        elif kind == "error":
            self.error = event
        elif kind == "step":
            self._steps[row], self._faults[row] = event["text"], 0
        elif kind == "faults":
            self._faults[row] = event["faults"]
        elif kind == "row":
            self.rows[row] = event
        if self._live:
            self._draw()
        elif kind == "row" or time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            click.echo("  ".join(cell for cell in self._cells(row) if cell), err=True)

    def _cells(self, row: int) -> list[str]:
        case = CASES[row]
        name = [case.moment, case.way]
        if row in self.rows:
            done = self.rows[row]
            spent = done["spent"]["populate"] + done["spent"]["prefault"]
            return [
                *name,
                f"{done['faults']:,}",
                f"{done['first_pass']:.3f}",
                f"{done['steady_pass']:.3f}",
                f"{spent:.3f}" if spent else "-",
            ]
        count = f"{self._faults[row]:,}" if self._faults[row] else ""
        return [*name, count, self._steps[row], "", ""]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table."""
        yield from table(HEADERS, [self._cells(row) for row in range(len(CASES))])

    def _draw(self) -> None:
        self.wipe()
        for line in self.lines():
            click.echo(line, err=True)
            self._drawn += 1

    def wipe(self) -> None:
        """Erase the table from the terminal."""
        if self._drawn:
            click.echo(f"\x1b[{self._drawn}A\x1b[J", err=True, nl=False)
            self._drawn = 0


def run_demo(as_json: bool, *, ept: bool = False) -> None:
    """Run the demo, and print the results as a table or as JSON.

    :param ept: Run the demo in the lab on an Intel CPU that Bochs emulates.
    :raises QemuPrefaultError: If a requirement is missing, or if the scenario failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    progress = LiveTable()
    with open_machine("ept" if ept else "trixie") as machine:
        emulator = machine.emulator if isinstance(machine, EmulatedMachine) else None
        nested = emulator is not None
        python = "python3" if nested else sys.executable
        machine.install_source()
        result = machine.run(
            [python, "-m", "qemu_prefault_lab.scenario"],
            timeout=LIMIT_SECONDS,
            check=False,
            on_output=progress.feed,
        )
    progress.wipe()
    if result.returncode or len(progress.rows) != len(CASES):
        raise FailedError(
            progress.error.get("cause", f"the scenario exited with status {result.returncode}"),
            progress.error.get("remedy") or result.error_text[-2000:],
            code="demo",
        )
    facts = {"nested": nested, "emulator": emulator, **progress.machine}
    if as_json:
        rows = [progress.rows[row] for row in range(len(CASES))]
        click.echo(
            json.dumps({"schema": SCHEMA, "machine": facts, "backing": "4K", "mib": WORKLOAD_MIB,
                        "rows": rows, "exit": 0})
        )  # fmt: skip
        return
    click.echo(
        f"A guest with 4K pages writes {WORKLOAD_MIB} MiB for the first time. "
        f"Kernel {facts['kernel']}, QEMU {facts['qemu']}, {_MMU[str(facts['mmu'])]}."
    )
    if nested:
        click.echo(
            f"{emulator} emulates the CPU. Counts are exact. Compare times only within this table."
        )
    if facts["mmu"] == "npt" and nested:
        click.echo("For a CPU with Intel's EPT, run: make demo DEMO_ARGS=--ept")
    click.echo()
    for line in progress.lines():
        click.echo(line)
