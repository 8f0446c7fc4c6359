# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest at work migrates again and again; the tool awaits it each time, and is often killed.

``--boots`` sets how many migrations (default 6; ``make test-full`` makes it 100), ``--seed``
repeats.
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


def migrate(source: Guest, directory: Path, moments: random.Random) -> tuple[Guest, str]:
    """Move the guest to a new QEMU, where the tool awaits it; returns that, and what happened."""
    uri = f"unix:{directory / 'migration'}"
    target = Guest(workload_mib=WORKLOAD_MIB, memory_mib=WORKLOAD_MIB + OTHER_MIB, incoming=uri)
    try:
        options = moments.choice(OPTIONS)
        tool = start_tool(target, "--incoming", *options)
        if moments.random() < 0.5:  # else it may come too late to await anything
            time.sleep(moments.uniform(0, 0.5))
        source.qmp("migrate", uri=uri)
        history = " ".join(options) or "plain"
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0, 4))  # a random moment: none is special
            tool.send_signal(signal.SIGKILL)
            tool.running(30)
            history += f", killed ({tool.status})"
        wait_migrated(source)
        if tool.status is None:
            result = tool.finish()
            assert result.status in (0, 5), (result.stdout, result.stderr)
            history += f", ended ({result.status})"
        wait_clean(target.pid)
        wait_for(lambda: target.status() == "running", "a guest that runs")
    except BaseException:
        target.kill()
        raise
    return target, history


def test_repeated_migration_under_load(
    request: pytest.FixtureRequest, tmp_path: Path, seed: int
) -> None:
    count: int = request.config.getoption("boots")
    moments = random.Random(seed)
    guest = Guest(workload_mib=WORKLOAD_MIB, memory_mib=WORKLOAD_MIB + OTHER_MIB)
    try:
        guest.wait_ready()
        assert guest.command("run")["ok"] == 1
        for number in range(count):
            guest.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
            target, history = migrate(guest, tmp_path, moments)
            guest.kill()
            guest = target
            state = guest.command("status")
            print(f"{number}: {history}; {state['passes']} passes")
            assert (state["bad"], state["running"]) == (0, 1)
    finally:
        guest.kill()
