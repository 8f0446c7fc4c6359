# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin leaves CPU time to the guest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import under_filter
from support.native import link_with_plugin

SCHED_SETSCHEDULER = 144


@dataclass(frozen=True)
class Piece:
    """A piece of work: the plugin's part of a CPU, and the longest duration (0: no limit)."""

    share: float
    seconds: float
    policy: int
    reason: str


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plugin_pace.c")
    return link_with_plugin(source, tmp_path_factory.mktemp("pace") / "work")


def work(
    program: Path,
    group: Path,
    ancestors: int = 0,
    unified: bool = True,
    policy: int = os.SCHED_OTHER,
    *prefix: str,
) -> Piece:
    numbers = (str(ancestors), str(int(unified)), str(policy))
    command: list[str | Path] = [*prefix, program, group, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this user cannot set a real-time policy")
    assert done.returncode == 0, done.stderr
    share, seconds, left, reason = done.stdout.strip().split(" ", 3)
    return Piece(float(share), float(seconds), int(left), reason)


def limit(group: Path, quota: int, period: int, unified: bool) -> None:
    """Write the files of a CPU cgroup, in microseconds. -1 means unlimited."""
    if unified:
        (group / "cpu.max").write_text(f"{'max' if quota < 0 else quota} {period}\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize("unified", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("limited", ["own", "ancestor"])
def test_quarter_of_the_smallest_quota_is_used(
    program: Path, tmp_path: Path, unified: bool, limited: str
) -> None:
    groups = [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    for group in groups:
        group.mkdir(exist_ok=True)
        limit(group, -1, 100000, unified)
    limit(groups[1], 400000, 100000, unified)
    limit(groups[2 if limited == "own" else 0], 200000, 1000000, unified)
    piece = work(program, groups[2], 2, unified)
    assert piece.share == pytest.approx(0.05, rel=0.1)
    assert 0 < piece.seconds <= 0.2 / 4
    assert piece.reason == "CPU quota"


@pytest.mark.parametrize("unified", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("quota", [-1, 800000])
def test_large_quota_does_not_slow_the_work(
    program: Path, tmp_path: Path, unified: bool, quota: int
) -> None:
    limit(tmp_path, quota, 100000, unified)
    assert work(program, tmp_path, 0, unified) == Piece(1, 0, os.SCHED_OTHER, "-")


def test_missing_files_are_no_limit(program: Path, tmp_path: Path) -> None:
    assert work(program, tmp_path, 3) == Piece(1, 0, os.SCHED_OTHER, "-")


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_RR])
def test_realtime_policy_is_left(program: Path, tmp_path: Path, policy: int) -> None:
    assert work(program, tmp_path, 0, True, policy) == Piece(1, 0, os.SCHED_OTHER, "-")


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_other_policies_are_kept(program: Path, tmp_path: Path, policy: int) -> None:
    assert work(program, tmp_path, 0, True, policy) == Piece(1, 0, policy, "-")


def test_thread_rests_if_it_cannot_leave_a_realtime_policy(program: Path, tmp_path: Path) -> None:
    """Check this under a filter that kills the process if it sets SCHED_OTHER."""
    kill = (sys.executable, under_filter.__file__, "kill", f"{SCHED_SETSCHEDULER}:1=0", "--")
    piece = work(program, tmp_path, 0, True, os.SCHED_FIFO, *kill)
    assert piece.policy == os.SCHED_FIFO
    assert piece.share <= 0.11
    assert 0 < piece.seconds <= 0.002
    assert piece.reason == "real-time scheduling"
