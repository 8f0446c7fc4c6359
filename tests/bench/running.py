# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure how long a running guest waits while its absent memory is prefaulted.

    running.py LOOP

The script needs KVM, so run.py runs the script in the lab or on a host that can prefault. The last
line of output is the results as JSON. The guest writes its workload all the time, and records the
longest time between the ends of two passes over it, in seconds (``gap``). In each of ten rounds,
the script measures one guest for each way: ``idle`` (no tool, for the same time as the tool with
the plugin), ``plugin`` (the tool through the plugin) and ``attach``. The order changes from round
to round. run.py passes LOOP to every script. This script ignores LOOP.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, Final

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.scenario import small_pages
from qemu_prefault_lab.wait import wait_for

ROUNDS: Final = 10
WORKLOAD_MIB, MEMORY_MIB = 4, 512
IDLE, PLUGIN, ATTACH = WAYS = ("idle", "plugin", "attach")


def run_tool(guest: Guest, agent: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "qemu_prefault", "--qmp", str(guest.qmp_path), "--json"]
    result = subprocess.run([*argv, "--agent", agent], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def measure(way: str, idle_seconds: float) -> dict[str, float]:
    plugin = None if way == ATTACH else ["keep=off"]
    with Guest(memory_mib=MEMORY_MIB, workload_mib=WORKLOAD_MIB, plugin=plugin) as guest:
        guest.wait_ready()
        if plugin is not None:
            wait_for(lambda: not guest.control("status")["booting"], "the guest no longer waits")
        guest.command("run")
        started = time.monotonic()
        paused = 0.0
        if way == IDLE:
            time.sleep(idle_seconds)
        else:
            paused = run_tool(guest, way)["seconds"]["paused"]
        seconds = time.monotonic() - started
        before = guest.stats()["pf_fixed"]
        stopped = guest.command("stop")
        guest.command(f"alloc {MEMORY_MIB - 128}")
        return {
            "gap": float(stopped["longest"]),
            "seconds": seconds,
            "paused": paused,
            "faults": guest.stats()["pf_fixed"] - before,
        }


def main() -> None:
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    seconds = 5.0
    with small_pages():
        for number in range(ROUNDS):
            first = number % len(WAYS)
            for way in (*WAYS[first:], *WAYS[:first]):
                row = measure(way, seconds)
                results[way].append(row)
                seconds = row["seconds"] if way == PLUGIN else seconds
                print(way, row, file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
