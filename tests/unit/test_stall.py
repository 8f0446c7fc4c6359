# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool detects helpers without progress, and finds the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from qemu_prefault.host.stall import Stall, why_stalled


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
