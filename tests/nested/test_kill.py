# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that killing the tool at random times leaves no helpers in QEMU.

``--kills`` sets the number of kills. The default is 100, and ``make test-full`` uses 1,000.
``--seed`` repeats the random delays of an earlier run of the test.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support.guest import prefault, start_tool
from support.process import leftovers, wait_clean

pytestmark = [pytest.mark.kill, pytest.mark.any_agent]

SPARE = 32 << 20
FALLOC_FL_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_KEEP_SIZE is 0x01


def punch_spare_memory(guest: Guest) -> None:
    """Free an unused device's memory, so that the next run populates it again."""
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:memory-backend-memfd"):
            fd = os.open(link, os.O_RDWR)
            try:
                if os.fstat(fd).st_size == SPARE:
                    fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, SPARE)
                    return
            finally:
                os.close(fd)
    raise AssertionError("the spare memory was not found")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(length))
    if libc.fallocate(*arguments):
        raise OSError(ctypes.get_errno(), "fallocate")


@pytest.mark.ept
def test_kill_at_random_moments(request: pytest.FixtureRequest, seed: int) -> None:
    kills: int = request.config.getoption("kills")
    args = ["-object", f"memory-backend-memfd,id=spare,size={SPARE}"]
    args += ["-device", "nvdimm,memdev=spare"]
    run = ("--populate", "all")
    rng = random.Random(seed)
    # Plugged memory would be above 4 GiB, so the guest's kernel reserves 64 MiB for bounce buffers
    # (pci_swiotlb_detect() in arch/x86/kernel/pci-dma.c).
    with Guest(
        machine="pc,nvdimm=on",
        memory_mib=192,
        memory="slots=2,maxmem=1G",
        workload_mib=32,
        args=args,
    ) as guest:
        guest.wait_ready()
        guest.command("run")
        started = time.monotonic()
        assert prefault(guest, *run).status == 0
        duration = time.monotonic() - started
        passes = 0.0
        killed = resumed_by_guard = 0
        resuming = leaving = 0.0
        for number in range(kills):
            punch_spare_memory(guest)
            tool = start_tool(guest, *run)
            begun = time.monotonic()
            if tool.running(rng.uniform(0, duration)):
                killed += 1
            else:  # this run was faster than the first run, and ended before the kill
                duration = time.monotonic() - begun
            tool.send_signal(signal.SIGKILL)
            assert not tool.running(10)
            resumed_by_guard += guest.status() != "running"
            resuming += wait_for(lambda: guest.status() == "running", f"kill {number}: paused")
            leaving += wait_clean(guest.pid)
            status = guest.command("status")
            assert status["bad"] == 0, f"kill {number}: {status}"
            assert float(status["passes"]) >= passes
            passes = float(status["passes"])
            if number % 20 == 19:
                assert prefault(guest, *run).status == 0
                assert guest.command("status")["bad"] == 0
        final = guest.command("stop")
        print(f"{killed} of {kills} runs killed, {resumed_by_guard} while paused; {final}")
        print(f"mean seconds: run {duration:.2f}, until resumed {resuming / kills:.2f}, ", end="")
        print(f"until the helpers have exited {leaving / kills:.2f}")
        assert final["bad"] == 0 and float(final["passes"]) > 0
        assert killed >= kills // 2
        assert prefault(guest, *run).status == 0
        assert leftovers(guest.pid) == []
