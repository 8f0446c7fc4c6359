# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how helpers share a limit on QEMU's CPU time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_prefault.agents import injector
from qemu_prefault.agents.base import Limits, VcpuThread
from qemu_prefault.agents.ptrace import within_quota
from qemu_prefault.host.cpu_quota import CpuQuota, parse_quota, quotas_of
from qemu_prefault.host.procfs import Process


@pytest.mark.parametrize(
    ("text", "period", "expected"),
    [
        ("20000 100000\n", None, (20000, 100000)),
        ("max 100000\n", None, None),
        ("20000\n", "100000\n", (20000, 100000)),
        ("-1\n", "100000\n", None),
        ("", "100000\n", None),
        ("20000\n", None, None),
        ("20000 0\n", None, None),
        ("1 2 3", None, None),
    ],
)
def test_quota_is_parsed(text: str, period: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_quota(text, period) == expected


def test_quotas_of_all_levels(tmp_path: Path) -> None:
    directories = [(str(tmp_path / name), unified) for name, unified in (("a", True), ("b", False))]
    for directory, _ in directories:
        Path(directory).mkdir()
    (tmp_path / "a/cpu.max").write_text("50000 100000\n")
    (tmp_path / "b/cpu.cfs_quota_us").write_text("30000\n")
    (tmp_path / "b/cpu.cfs_period_us").write_text("10000\n")
    found = quotas_of([*directories, (str(tmp_path / "root"), True)])
    assert [(quota.cpus, Path(quota.name).name) for quota in found] == [
        (0.5, "cpu.max"),
        (3.0, "cpu.cfs_quota_us"),
    ]


@pytest.mark.parametrize(
    ("quota_us", "period_us", "helpers", "rest_percent", "chunk_kib"),
    [
        (20000, 100000, 1, 1900, 1024),
        (1000, 100000, 1, 39900, 248),
        (1000, 1000000, 1, 399900, 248),
        (100, 1000, 1, 3900, 64),
        (300000, 100000, 1, 34, 1024),
        (400000, 100000, 1, 0, 1024),
        (3200000, 100000, 8, 0, 1024),
    ],
)
def test_helpers_use_a_quarter_of_the_quota(
    quota_us: int, period_us: int, helpers: int, rest_percent: int, chunk_kib: int
) -> None:
    quota = CpuQuota("", quota_us, period_us)
    assert (quota.helpers, quota.rest_percent) == (helpers, rest_percent)
    assert quota.chunk_bytes == chunk_kib << 10
    share = quota.helpers / (1 + quota.rest_percent / 100)
    assert share <= quota.cpus / 4


def test_helpers_rest_only_with_a_quota() -> None:
    limits = Limits()
    assert within_quota(limits, None) == limits
    assert within_quota(limits, CpuQuota("", 800000, 100000)) == limits
    slow = within_quota(limits, CpuQuota("", 20000, 100000))
    assert slow.rest_percent == 1900
    assert slow.rest_bytes <= 1 << 20 and slow.chunk_bytes <= 2 << 20
    assert within_quota(Limits(chunk_bytes=4096), CpuQuota("", 20000, 100000)).rest_bytes == 4096


def test_quota_reduces_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = CpuQuota("", 20000, 100000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(injector, "task_limits", lambda process: [])
    monkeypatch.setattr(injector, "cpu_quota", lambda process: quota)
    threads = [VcpuThread(100 + i, -1, None, index=i) for i in range(8)]
    assert len(injector.choose_threads(Process(os.getpid(), 0), threads)) == 1
