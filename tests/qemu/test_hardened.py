# SPDX-License-Identifier: GPL-2.0-or-later
"""Test QEMUs with MDWE, with small stacks, and with abandoned helpers' memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault.agents.base import VcpuThread
from qemu_prefault.agents.control_page import AREA_SIZE, CODE_SIZE
from qemu_prefault.agents.gadgets import AREAS_FROM
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.host.procfs import Process
from support.process import leftovers
from support.qemu import StartQemu, start_vm

# include/uapi/linux/prctl.h: PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN (Linux 6.3)
MDWE = (
    "import ctypes, os, sys\n"
    "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit('no PR_SET_MDWE')\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
# Map the memory of two helpers. The first helper never started. The second helper is running: its
# tid is set.
ABANDONED = f"""
import ctypes, sys
from qemu_prefault._native import ffi, lib
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_long] * 6
for area in {AREAS_FROM + (1 << 30):#x}, {AREAS_FROM + (1 << 31):#x}:
    control = area + {CODE_SIZE}
    assert libc.mmap(area, {CODE_SIZE}, 5, 0x100022, -1, 0) == area
    assert libc.mmap(control, {AREA_SIZE - CODE_SIZE}, 3, 0x100022, -1, 0) == control
    page = ffi.cast("struct prefault_control *", control)
    page.magic = lib.PREFAULT_CONTROL_MAGIC
page.tid = 1
print("ready", flush=True)
sys.stdin.read()
"""


def test_memory_deny_write_execute(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_vm(
        start_qemu, tmp_path, "-m", "64M", accel="kvm", prefix=[sys.executable, "-c", MDWE]
    )
    finding = next(f for f in vm.command("probe").report["findings"] if f["check"] == "attach")
    assert finding["verdict"] == "ok"
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr
    assert leftovers(vm.pid) == []


def test_small_stacks(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that helpers start from threads with musl's default stacks of 128 KiB.

    An injection writes about 6 KiB to a stack, or 15 KiB with AMX.
    """
    prefix = ["sh", "-c", 'ulimit -s 128; exec "$@"', "sh"]
    vm = start_vm(start_qemu, tmp_path, "-m", "64M", "-smp", "2", prefix=prefix)
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr
    assert leftovers(vm.pid) == []


@pytest.fixture
def abandoned() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDONED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_abandoned_memory_is_unmapped(abandoned: subprocess.Popen[str]) -> None:
    async def run() -> None:
        thread = VcpuThread(abandoned.pid, -1, None)
        agent = PtraceAgent(Process.find(abandoned.pid), [thread])
        await agent.start()
        await agent.close()

    before = leftovers(abandoned.pid)
    assert len(before) == 4
    asyncio.run(run())
    assert leftovers(abandoned.pid) == before[2:]
    assert abandoned.poll() is None
