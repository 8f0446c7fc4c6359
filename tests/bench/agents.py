# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure restored guests with each agent, and with the patched QEMU alone.

    agents.py LOOP

The script needs KVM, so run.py runs the script in the lab or on a host that can prefault. The last
line of output is the results as JSON. For "qmp", "job" and "prefault=on", the script uses the
patched QEMU, whose path is in an environment variable. For "job", the script starts QEMU's
x-kvm-prefault-memory job without the tool. run.py passes LOOP to every script. This script ignores
LOOP.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qemu_prefault_lab.guest import Guest, patched_qemu
from qemu_prefault_lab.scenario import small_pages

ROUNDS, WORKLOAD_MIB, MEMORY_MIB = 3, 256, 352
WAYS = ("nothing", "attach", "plugin", "qmp", "job", "prefault=on")
PATCHED = ("qmp", "job", "prefault=on")


def start(way: str, state: Path | None) -> Guest:
    with small_pages():
        return Guest(
            machine="microvm",
            memory_mib=MEMORY_MIB,
            workload_mib=0 if state else WORKLOAD_MIB,
            accel="kvm,prefault=on" if way == "prefault=on" else "kvm",
            qemu=patched_qemu() if way in PATCHED else None,
            plugin=["keep=off"] if way == "plugin" else None,
            paused=state is not None,
            incoming=state,
        )


def run_tool(guest: Guest, agent: str) -> dict[str, float]:
    argv = [sys.executable, "-m", "qemu_prefault", "--qmp", str(guest.qmp_path), "--json"]
    result = subprocess.run([*argv, "--agent", agent], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    seconds: dict[str, float] = json.loads(result.stdout)["seconds"]
    return seconds


def run_job(guest: Guest) -> dict[str, float]:
    started = time.monotonic()
    guest.qmp("x-kvm-prefault-memory", job_id="job")
    while guest.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
        pass
    seconds = time.monotonic() - started
    guest.qmp("job-dismiss", id="job")
    return {"total": seconds, "prefault": seconds}


def measure(way: str, state: Path) -> dict[str, float]:
    with start(way, state) as guest:
        guest.wait_restored()
        seconds = {"total": 0.0, "prefault": 0.0}
        if way in ("attach", "plugin", "qmp"):
            seconds = run_tool(guest, way)
        elif way == "job":
            seconds = run_job(guest)
        before = guest.stats()["pf_taken"]
        resuming = time.monotonic()
        guest.qmp("cont")
        resumed = time.monotonic() - resuming  # prefault=on does its work during cont
        first = guest.command("pass")
        faults = guest.stats()["pf_taken"] - before
        steady = statistics.median(float(guest.command("pass")["seconds"]) for _ in range(3))
    return {
        "faults": faults,
        "prefault": seconds["prefault"] or (resumed if way == "prefault=on" else 0.0),
        "blackout": seconds["total"] + resumed,
        "first": float(first["seconds"]),
        "steady": steady,
    }


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        states = [Path(scratch) / name for name in ("stock", "patched")]
        for way, state in zip(("nothing", "job"), states, strict=True):
            with start(way, None) as guest:
                guest.wait_ready()
                guest.save(state)
        for _ in range(ROUNDS):
            for way, rows in found.items():
                rows.append(measure(way, states[way in PATCHED]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
