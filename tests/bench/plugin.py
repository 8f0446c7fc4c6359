# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure boots with and without the plugin.

    plugin.py LOOP [METHOD...]

The script needs KVM, so run.py runs the script in the lab or on a host that can prefault. The last
line of output is the results as JSON. Durations are in seconds, from QEMU's start until the guest
has booted and written its memory.

METHOD is ``nothing``, ``plugin``, ``keep=off`` or ``prealloc=on``. The script measures five rounds
with 4K pages. Each round measures one boot for each METHOD. The order changes from round to round.
run.py passes LOOP to every script. This script ignores LOOP.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qemu_prefault_lab.guest import Guest, thp

ROUNDS: Final = 5
WORKLOAD_MIB: Final = 256
MACHINES: Final = ("pc", "q35", "microvm")
NOTHING, PLUGIN, OFF, PREALLOC = WAYS = ("nothing", "plugin", "keep=off", "prealloc=on")
PLUGIN_OPTIONS: Final = {PLUGIN: [], OFF: ["keep=off"]}


def start(machine: str, way: str) -> Guest:
    return Guest(
        machine=machine,
        workload_mib=WORKLOAD_MIB,
        backing="ram,prealloc=on" if way == PREALLOC else "ram",
        plugin=PLUGIN_OPTIONS.get(way),
        args=["-action", "reboot=reset"],
    )


def anonymous_mib(pid: int) -> float:
    """Return QEMU's anonymous resident memory, including the guest's, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def boot(machine: str, way: str, again: bool = False) -> dict[str, Any]:
    """Measure one boot and, if ``again`` is set, a reset and a second boot."""
    started = time.monotonic()
    with start(machine, way) as guest:
        guest.wait_ready()
        found: dict[str, Any] = {"seconds": time.monotonic() - started}
        stats = guest.stats()
        # Exclude exits for host interrupts, because their number depends only on the duration.
        exits = stats["exits"] - stats["irq_exits"]
        found |= {"faults": stats["pf_taken"], "exits": exits}
        found["anonymous_mib"] = anonymous_mib(guest.pid)
        if way == PLUGIN:
            counters = guest.control("status")["counters"]
            found |= {name: counters[name] for name in ("populate_seconds", "again_seconds")}
        if again:
            before = guest.stats()["pf_taken"]
            started = time.monotonic()
            guest.reset()
            guest.wait_ready()
            found["second"] = {
                "seconds": time.monotonic() - started,
                "faults": guest.stats()["pf_taken"] - before,
            }
    return found


def rounds(machine: str, ways: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):
            found[way].append(boot(machine, way, again=way in (NOTHING, PLUGIN)))
            print(machine, way, found[way][-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    ways = sys.argv[2:] or WAYS
    before = thp("never")
    try:
        results: dict[str, Any] = {"4k": {machine: rounds(machine, ways) for machine in MACHINES}}
        thp("always")
        results["thp"] = {
            machine: {way: boot(machine, way)["faults"] for way in (NOTHING, PLUGIN)}
            for machine in MACHINES
        }
    finally:
        thp(before)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
