# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool detects helpers without progress, and finds the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from qemu_prefault.host import stall
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.stall import IdleThreads, ProgressLimit, Stall, why_stalled

MIB = 1 << 20
#: A thread that the kernel sees populating, slowly.
POPULATE = """
import mmap, time
while True:
    memory = mmap.mmap(-1, 1 << 16)
    memory.madvise(23)  # MADV_POPULATE_WRITE
    memory.close()
    time.sleep(0.02)
"""
#: A thread that takes page faults, but too few to populate memory.
RARE_FAULTS = POPULATE.replace("1 << 16", "4096").replace("0.02", "0.4")
SPIN = "while True: pass"
#: A thread that waits for work as a helper does.
NAP = "import time\nwhile True: time.sleep(0.0003)"


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [
        ("input()", 0, "waits in the kernel"),
        ("while True: pass", 0, "is running in the kernel"),
        ("input()", signal.SIGSTOP, "QEMU is stopped"),
    ],
)
def test_reason(code: str, number: int, expected: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True); {code}" if "while" not in code
         else f"print(flush=True)\n{code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        if number:
            process.send_signal(number)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert expected in why_stalled(process.pid, process.pid, 0.5)
    finally:
        process.kill()
        process.communicate()


def test_stall_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stall = Stall()
    starts = []
    for now, state in [(10, 1), (11.9, 1), (12.1, 1), (20, 1), (21, 2), (22, 2), (23.5, 2)]:
        clock[0] = now
        starts.append(stall.starts(state))
    assert starts == [False, False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("code", "faults_only", "idle"),
    [
        (POPULATE, True, False),
        (RARE_FAULTS, True, True),
        (SPIN, True, True),
        (SPIN, False, False),
        ("input()", True, True),
        ("input()", False, True),
    ],
    ids=[
        "populates",
        "takes few page faults",
        "spins instead of populating",
        "spins",
        "sleeps instead of populating",
        "sleeps",
    ],
)
def test_idle_threads(
    monkeypatch: pytest.MonkeyPatch, code: str, faults_only: bool, idle: bool
) -> None:
    monkeypatch.setattr(stall, "IDLE_INTERVAL", 0.2)
    with subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True)\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        threads = IdleThreads(
            Process.find(process.pid), lambda: [process.pid], faults_only=faults_only
        )
        deadline = time.monotonic() + 60
        readings = [threads.seconds()]
        while len(readings) < 8 or (idle and readings[-1] < 1 and time.monotonic() < deadline):
            readings.append(threads.seconds())
            time.sleep(0.25)
        process.kill()
    assert readings[0] == 0
    assert (readings[-1] >= 1) is idle, readings
    if not idle:
        assert max(readings) == 0


@pytest.mark.parametrize(
    ("code", "policy", "idle"),
    [(SPIN, os.SCHED_IDLE, False), (NAP, os.SCHED_OTHER, True)],
    ids=["needs the CPU", "sleeps for short times"],
)
def test_thread_on_a_busy_cpu(
    monkeypatch: pytest.MonkeyPatch, code: str, policy: int, idle: bool
) -> None:
    """A thread that waits for its CPU all the time is not idle, but one that only naps is."""
    monkeypatch.setattr(stall, "IDLE_INTERVAL", 0.2)
    cpu = {min(os.sched_getaffinity(0))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE
        )
        for program in (code, *[SPIN] * 4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
            os.sched_setaffinity(process.pid, cpu)
        observed = processes[0].pid
        os.sched_setscheduler(observed, policy, os.sched_param(0))
        threads = IdleThreads(Process.find(observed), lambda: [observed], faults_only=True)
        readings = []
        for _ in range(9):
            readings.append(threads.seconds())
            time.sleep(0.5)
        assert readings == sorted(readings)
        assert (readings[-1] > 3) is idle and (readings[-1] > 0) is idle, readings
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("total", "reports", "reached_at"),
    [
        (64 * MIB, {0: 0}, 9),
        (64 * MIB, {0: 0, 5: MIB, 10: 2 * MIB}, 19),
        (64 * MIB, {at: at * 4096 for at in range(60)}, 9),
        (64 * MIB, {at: at % 2 * 32 * MIB for at in range(60)}, 10),
        (4096, {0: 0, 5: 4096}, 14),
        (4096, {at: 1 << 70 for at in range(60)}, 9),
    ],
    ids=["none", "enough", "a page at a time", "to and fro", "small batch", "more than all"],
)
def test_progress_limit(
    monkeypatch: pytest.MonkeyPatch, total: int, reports: dict[int, int], reached_at: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limit = ProgressLimit(total, 8)
    done = 0
    for now in range(60):
        clock[0] = now
        done = reports.get(now, done)
        seconds = limit.exceeded(done)
        if seconds is not None:
            assert now == reached_at and seconds > 8
            return
    pytest.fail("the limit was not reached")
