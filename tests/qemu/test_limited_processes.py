# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the errors if QEMU or the tool reaches one of its own resource limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.limits import cgroups, in_group
from support.process import leftovers
from support.qemu import QemuVm, StartQemu, start_vm

#: Set the policy SCHED_DEADLINE for all threads of a process (sched_setattr(2)).
DEADLINE = """
import ctypes, os, struct, sys
attributes = struct.pack("<2IQiI3Q", 48, 6, 0, 0, 0, 1_000_000, 10_000_000, 10_000_000)
for thread in os.listdir(f"/proc/{sys.argv[1]}/task"):
    if ctypes.CDLL(None, use_errno=True).syscall(314, int(thread), attributes, 0):
        sys.exit(os.strerror(ctypes.get_errno()))
"""


@pytest.fixture
def vm(start_qemu: StartQemu, tmp_path: Path) -> QemuVm:
    return start_vm(start_qemu, tmp_path, "-m", "64M", paused=False)


def used(vm: QemuVm, field: str) -> int:
    """Return the size in bytes that a field of QEMU's /proc/PID/status shows."""
    lines = Path(f"/proc/{vm.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize(
    ("limit", "field", "option"),
    [(resource.RLIMIT_AS, "VmSize", "--as"), (resource.RLIMIT_DATA, "VmData", "--data")],
)
def test_qemus_limit_is_named(vm: QemuVm, limit: int, field: str, option: str) -> None:
    _, hard = resource.prlimit(vm.pid, limit)
    resource.prlimit(vm.pid, limit, (used(vm, field) // 2, hard))  # QEMU can map nothing more
    result = vm.prefault("--populate-only")
    assert result.status == 1 and result.error["code"] == "agent"
    assert f"prlimit --pid {vm.pid} {option}=unlimited" in result.error["remedy"]
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []


def test_deadline_threads_are_named(vm: QemuVm) -> None:
    command = [sys.executable, "-c", DEADLINE, str(vm.pid)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"sched_setattr: {done.stderr.strip()}")
    result = vm.prefault("--populate-only")
    assert result.status == 1 and "SCHED_DEADLINE" in result.error["cause"]
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []


def error_of(vm: QemuVm, prefix: Sequence[str]) -> dict[str, str]:
    """Run the tool with a prefix, and return its error."""
    tool = [sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp, "--json"]
    command = [*prefix, *tool, "--populate-only"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []
    error: dict[str, str] = json.loads(done.stdout)["error"]
    return error


@pytest.mark.parametrize("count", range(6, 13))
def test_tools_limit_on_open_files_is_named(vm: QemuVm, count: int) -> None:
    error = error_of(vm, ["sh", "-c", f'ulimit -n {count}; exec "$@"', "sh"])
    assert error["code"] != "bug" and "ulimit -n" in error["remedy"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create cgroups")
@pytest.mark.parametrize("count", [1, 2])
def test_tools_limit_on_tasks_is_named(vm: QemuVm, count: int) -> None:
    with cgroups("pids") as ((group,), _):
        (group / "pids.max").write_text(str(count))
        error = error_of(vm, in_group(group))
    assert error["code"] != "bug" and "pids.max" in error["remedy"]
