# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the process that interrupts helpers that cannot create timers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from qemu_prefault.agents.ticker import Ticker, is_pending

NAME, SIGNAL = "qemu-prefault", 64
# A program that counts signals and exits after a given number of them.
HELPER = f"""
import signal, sys
got = []
signal.signal({SIGNAL}, lambda *_: got.append(1))
open("/proc/self/comm", "w").write(sys.argv[1])
print("ready", flush=True)
while len(got) < int(sys.argv[2]): signal.pause()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., int]]:
    processes = []

    def start_one(name: str, count: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", HELPER, name, str(count)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process.pid

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def test_ticks_until_the_helper_exits(start: Callable[..., int]) -> None:
    pid = start(NAME, 5)
    asyncio.run(Ticker(pid, [(pid, SIGNAL)], NAME, 0.02).wait(seconds=30))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_ticks_after_the_tool_is_killed(start: Callable[..., int]) -> None:
    pid = start(NAME, 20)
    tool = os.fork()
    if tool == 0:
        Ticker(pid, [(pid, SIGNAL)], NAME, 0.02)
        signal.pause()
    time.sleep(0.05)
    os.kill(tool, signal.SIGKILL)
    os.waitpid(tool, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_reused_thread_id_gets_no_signal(start: Callable[..., int]) -> None:
    pid = start("another", 1)
    asyncio.run(Ticker(pid, [(pid, SIGNAL)], NAME, 0.02).wait(seconds=30))
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_helper_that_never_exits_is_not_waited_for(start: Callable[..., int]) -> None:
    """Check a QEMU that renames a thread, so that it looks like a helper."""
    pid = start(NAME, 1 << 30)

    async def check() -> float:
        ticker = Ticker(pid, [(pid, SIGNAL)], NAME, 0.02)
        started = time.monotonic()
        waiting = asyncio.create_task(ticker.wait(seconds=0.3))
        await asyncio.sleep(0.01)
        assert not waiting.done(), "wait() blocks the event loop"
        await waiting
        with pytest.raises(ProcessLookupError):
            os.kill(ticker._child, 0)
        return time.monotonic() - started

    assert 0.3 <= asyncio.run(check()) < 5
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_pending_signal_is_not_sent_again() -> None:
    text = "Name:\tx\nSigPnd:\t8000000000000000\nShdPnd:\t0000000000000001\n"
    assert is_pending(text, 64)
    assert not is_pending(text, 63) and not is_pending(text, 1)
    assert not is_pending("", 64)
