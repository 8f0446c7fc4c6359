# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure the time that ``--incoming`` adds to a migration's blackout.

    incoming.py LOOP

The script needs KVM, so run.py runs the script in the lab or on a host that can prefault. The last
line of output is the results as JSON. LOOP is a program that only issues the ioctl. The script runs
LOOP on the same amount of memory.

The script measures five rounds. Each round measures two migrations without the tool and two with
the tool. The order changes from round to round. In the first migration of each pair, the guest
writes continuously. In the second migration, the guest does not write, so that the script can
measure the guest's first pass over its memory on the destination.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.scenario import NOTHING, TOOL, small_pages
from qemu_prefault_lab.wait import wait_for
from support.tool import Tool

ROUNDS: Final = 5
MEMORY_MIB: Final = 512
WORKLOAD_MIB: Final = 384
CHUNK_MIB: Final = 32


def seconds_of(event: dict[str, Any]) -> float:
    """Return QEMU's timestamp of an event, in seconds since 1970.

    Both QEMUs run on one host, so their timestamps are comparable.
    """
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def save(state: Path) -> None:
    with Guest(memory_mib=MEMORY_MIB, workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        guest.save(state)


def migrate(way: str, state: Path, directory: Path, busy: bool) -> dict[str, Any]:
    """Run one migration, and return its measurements.

    :param busy: Whether the guest writes during the migration.
    :returns: Durations in seconds, except for ``faults``, which is the number of stage-2 faults on
        the destination until the guest has made two passes over its memory.
    """
    uri = f"unix:{directory / 'migration'}"
    with (
        Guest(memory_mib=MEMORY_MIB, incoming=state, paused=True) as source,
        Guest(memory_mib=MEMORY_MIB, incoming=uri) as target,
    ):
        source.wait_restored()
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=1)
        source.qmp("cont")
        if busy:
            source.command("run")
        found: dict[str, Any] = {}
        tool = None
        if way == TOOL:
            tool = Tool(["--qmp", str(target.qmp_path), "--incoming", "--json"])
            wait_for(lambda: tool.has_said("ready"), "the tool is ready", 60)
        source.qmp("migrate", uri=uri)
        # Wait until QEMU has sent all memory once, so that the destination's memory is populated
        # before the migration can complete.
        wait_for(
            lambda: source.qmp("query-migrate").get("ram", {}).get("dirty-sync-count", 0) > 1,
            "a second round",
            60,
        )
        source.qmp("migrate-set-parameters", downtime_limit=60_000)
        # Wait until the tool has exited before reading the values. On a machine with one CPU,
        # reading them would delay the tool.
        if tool is not None:
            result = tool.finish()
            if result.status:
                raise SystemExit(result.stderr)
            found |= {name: result.report["seconds"][name] for name in ("paused", "prefault")}
        stopped = seconds_of(source.wait_event("STOP"))
        resumed = seconds_of(target.wait_event("RESUME"))
        found["blackout"] = resumed - stopped
        if tool is not None:
            while (arrived := target.wait_event("MIGRATION"))["data"]["status"] != "completed":
                pass
            # Without the tool, QEMU would start the guest at this event. The time from this event
            # to RESUME is the time that the tool adds. The whole blackout varies more.
            found["added"] = resumed - seconds_of(arrived)
        if busy:
            target.command("stop")
        first, steady = target.command("pass"), target.command("pass")
        assert (first["bad"], steady["bad"]) == (0, 0)
        found |= {"first": first["seconds"], "steady": steady["seconds"]}
        found["faults"] = target.stats()["pf_taken"]
    return found


def main() -> None:
    rounds: list[dict[str, Any]] = []
    with small_pages(), tempfile.TemporaryDirectory() as scratch:
        loop = subprocess.Popen(
            [sys.argv[1], str(MEMORY_MIB), str(CHUNK_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert loop.stdin and loop.stdout

        def bare_ioctl() -> float:
            assert loop.stdin and loop.stdout
            loop.stdin.write("\n")
            loop.stdin.flush()
            return float(loop.stdout.readline())

        state = Path(scratch) / "state"
        save(state)
        for number in range(ROUNDS):
            found: dict[str, Any] = {}
            loops: list[float] = []
            for way in (NOTHING, TOOL)[:: 1 if number % 2 else -1]:
                loops.append(bare_ioctl())
                found[way] = migrate(way, state, Path(scratch), busy=True)
                loops.append(bare_ioctl())
                idle = migrate(way, state, Path(scratch), busy=False)
                found[way] |= {name: idle[name] for name in ("first", "steady")}
            found["loop"] = statistics.mean(loops)
            rounds.append(found)
            print(found, file=sys.stderr, flush=True)
    loop.stdin.close()
    loop.wait()
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
