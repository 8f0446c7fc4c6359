# SPDX-License-Identifier: GPL-2.0-or-later
"""Test QEMUs with seccomp filters that deny system calls or kill the process.

If helpers need the denied system call, the tool must refuse the run. Otherwise the helpers must not
make the call.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.agents.base import VcpuThread
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.agents.qemu_process import helper_threads
from qemu_prefault.host.procfs import Process
from support import under_filter
from support.process import leftovers
from support.qemu import QemuVm, StartQemu, start_vm

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# QEMU itself makes some of these calls, so the filters compare the arguments of helpers' calls.
NEEDED = {
    "clone": "56",
    "executable mmap": "9:3=0x100022",
    "rt_sigaction": "13:0=64",
    "prctl": "157:0=15",
    "madvise": "28:2=23",
    "nanosleep": "35",
    "set_tid_address": "218:0=0",
    "restart_syscall": "219",
}
OPTIONAL = {
    "kill": ["62"],
    "timer_create": ["222"],
    "timer_settime": ["223"],
    "timer_delete": ["226"],
    "all optional": ["62", "222", "223", "226"],
    "calls of debuggers": ["310", "311", "101"],
    "mprotect to executable": ["10:2=5"],
    "unused number": ["450"],
}


def vm_under(start_qemu: StartQemu, tmp_path: Path, *filters: str, sandbox: bool = False) -> QemuVm:
    prefix = [sys.executable, under_filter.__file__, *filters, "--"]
    arguments = ("-m", "64M", "-smp", "2", *(("-sandbox", SANDBOX) if sandbox else ()))
    return start_vm(start_qemu, tmp_path, *arguments, prefix=prefix if filters else ())


def assert_unharmed(vm: QemuVm) -> None:
    assert vm.qemu.process.poll() is None, "QEMU was killed"
    assert leftovers(vm.pid) == []
    vm.qmp.execute("cont")
    assert vm.qmp.status() == "running"


@pytest.mark.parametrize("call", NEEDED)
def test_killing_a_needed_call_is_refused(start_qemu: StartQemu, tmp_path: Path, call: str) -> None:
    vm = vm_under(start_qemu, tmp_path, "kill", NEEDED[call])
    result = vm.prefault("--populate-only")
    assert result.status == 4, result.stderr
    assert result.error["code"] == "seccomp"
    assert call.rsplit(maxsplit=1)[-1] in result.error["cause"]
    assert result.error["remedy"]
    finding = next(f for f in vm.command("probe").report["findings"] if f["check"] == "attach")
    assert (finding["verdict"], finding["text"]) == ("no", result.error["cause"])
    assert_unharmed(vm)


@pytest.mark.parametrize("calls", OPTIONAL)
def test_killing_another_call_is_harmless(
    start_qemu: StartQemu, tmp_path: Path, calls: str
) -> None:
    vm = vm_under(start_qemu, tmp_path, "kill", *OPTIONAL[calls])
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr
    assert_unharmed(vm)


def test_helper_without_timers_has_a_ticker(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that the ticker runs and that it exits together with the helpers."""
    vm = vm_under(start_qemu, tmp_path, "kill", "222", "62")
    process = Process.find(vm.pid)

    async def run() -> None:
        threads = [VcpuThread(tid, -1, None) for tid in process.threads()[:1]]
        agent = PtraceAgent(process, threads)
        await agent.start()
        assert agent._ticker is not None
        assert len(helper_threads(vm.pid)) == 1
        await asyncio.sleep(0.5)
        ticker = agent._ticker._child
        await agent.close()
        with pytest.raises(ChildProcessError):
            os.waitpid(ticker, 0)

    asyncio.run(run())
    assert_unharmed(vm)


@pytest.mark.parametrize("action", ["errno", "trap"])
def test_denied_call_is_refused(start_qemu: StartQemu, tmp_path: Path, action: str) -> None:
    vm = vm_under(start_qemu, tmp_path, action, NEEDED["nanosleep"])
    assert vm.prefault("--populate-only").status == 4
    assert_unharmed(vm)


@pytest.mark.parametrize(
    ("filters", "sandbox", "status"),
    [
        ((), True, 0),
        (("log,allow", "9", "28", "35"), False, 0),
        (("allow", "62"), True, 0),
        (("kill", "62"), True, 0),
        (("kill", "35"), True, 4),
        (("allow,kill,allow", "35"), False, 4),
    ],
    ids=["sandbox", "two that allow", "sandbox and allow", "sandbox and optional call",
         "sandbox and needed call", "one of three kills"],
)  # fmt: skip
def test_stacked_filters(
    start_qemu: StartQemu, tmp_path: Path, filters: tuple[str, ...], sandbox: bool, status: int
) -> None:
    vm = vm_under(start_qemu, tmp_path, *filters, sandbox=sandbox)
    result = vm.prefault("--populate-only")
    assert result.status == status, result.stderr
    assert_unharmed(vm)


@pytest.mark.parametrize(
    ("filters", "sandbox", "status"),
    [((), True, 0), (("kill", "310"), False, 4), (("kill", "310"), True, 4)],
    ids=["sandbox", "another", "sandbox and another"],
)
def test_unreadable_filters(
    start_qemu: StartQemu, tmp_path: Path, filters: tuple[str, ...], sandbox: bool, status: int
) -> None:
    """Check that only QEMU's own filter is accepted without CAP_SYS_ADMIN.

    Without this capability, the tool cannot read filters (PTRACE_SECCOMP_GET_FILTER).
    """
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    vm = vm_under(start_qemu, tmp_path, *filters, sandbox=sandbox)
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    command = [sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp, "--populate-only"]
    done = subprocess.run([*without, *command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert status == 0 or "that this process cannot read" in done.stderr
    assert_unharmed(vm)
