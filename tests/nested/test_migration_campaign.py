# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate a running guest repeatedly, and kill some runs of the tool.

One run of the tool waits on each destination. ``--boots`` sets the number of migrations. The
default is 6, and ``make test-full`` uses 100. ``--seed`` repeats the random choices of an earlier
run of the test.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import OTHER_MIB, start_tool, wait_migrated
from support.process import wait_clean

pytestmark = [pytest.mark.campaign, pytest.mark.any_agent]

WORKLOAD_MIB = 32
OPTIONS = [(), ("--chunk", "64K"), ("--max-downtime", "0.02", "--chunk", "1M")]


def migrate(source: Guest, directory: Path, rng: random.Random) -> tuple[Guest, str]:
    """Migrate to a new QEMU while the tool waits for the incoming guest.

    :returns: The migrated guest, and a description of the migration.
    """
    uri = f"unix:{directory / 'migration'}"
    target = Guest(workload_mib=WORKLOAD_MIB, memory_mib=WORKLOAD_MIB + OTHER_MIB, incoming=uri)
    try:
        options = rng.choice(OPTIONS)
        tool = start_tool(target, "--incoming", *options)
        if rng.random() < 0.5:  # otherwise the migration may start before the tool waits for it
            time.sleep(rng.uniform(0, 0.5))
        source.qmp("migrate", uri=uri)
        history = " ".join(options) or "plain"
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 4))  # kill the tool at any time during the migration
            tool.send_signal(signal.SIGKILL)
            tool.running(30)
            history += f", killed ({tool.status})"
        wait_migrated(source)
        if tool.status is None:
            result = tool.finish()
            assert result.status in (0, 5), (result.stdout, result.stderr)
            history += f", ended ({result.status})"
        wait_clean(target.pid)
        wait_for(lambda: target.status() == "running", "the guest runs")
    except BaseException:
        target.kill()
        raise
    return target, history


def test_repeated_migration_under_load(
    request: pytest.FixtureRequest, tmp_path: Path, seed: int
) -> None:
    count: int = request.config.getoption("boots")
    rng = random.Random(seed)
    guest = Guest(workload_mib=WORKLOAD_MIB, memory_mib=WORKLOAD_MIB + OTHER_MIB)
    try:
        guest.wait_ready()
        assert guest.command("run")["ok"] == 1
        for number in range(count):
            guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
            target, history = migrate(guest, tmp_path, rng)
            guest.kill()
            guest = target
            state = guest.command("status")
            print(f"{number}: {history}; {state['passes']} passes")
            assert (state["bad"], state["running"]) == (0, 1)
    finally:
        guest.kill()
