# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the errors if QEMU or the tool reaches one of its own resource limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qemu_prefault_lab.wait import wait_for
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


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("limit", "field", "option"),
    [(resource.RLIMIT_AS, "VmSize", "--as"), (resource.RLIMIT_DATA, "VmData", "--data")],
)
def test_last_address_space_is_left_to_qemu(
    vm: QemuVm, limit: int, field: str, option: str, dry_run: bool
) -> None:
    """Check that helpers do not take the address space that QEMU's next threads need."""
    _, hard = resource.prlimit(vm.pid, limit)
    resource.prlimit(vm.pid, limit, (used(vm, field) + (8 << 20), hard))
    result = vm.prefault("--populate-only", *(["--dry-run"] if dry_run else []))
    assert result.status == 5 and result.error["code"] == "no-tasks"
    assert f"prlimit --pid {vm.pid} {option}=unlimited" in result.error["remedy"]
    assert vm.qmp.status() == "running"
    assert leftovers(vm.pid) == []


def test_last_mappings_are_left_to_qemu(start_qemu: StartQemu, tmp_path: Path) -> None:
    library = tmp_path / "map_hog.so"
    source = Path(__file__).with_name("map_hog.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 1 << 20:
        pytest.skip(f"vm.max_map_count is {most}")
    prefix = ["env", f"LD_PRELOAD={library}"]
    vm = start_vm(start_qemu, tmp_path, "-m", "64M", prefix=prefix)
    os.kill(vm.pid, signal.SIGUSR2)

    def left() -> int:
        return most - Path(f"/proc/{vm.pid}/maps").read_bytes().count(b"\n")

    wait_for(lambda: left() < 100, "few mappings are left", 60)
    result = vm.prefault("--populate-only")
    assert result.status == 5 and result.error["code"] == "no-tasks"
    assert f"because vm.max_map_count is {most}" in result.error["cause"]
    assert vm.qmp.status() == "prelaunch"
    vm.qmp.execute("object-add", qom_type="iothread", id="t0")
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create cgroups and namespaces")
@pytest.mark.parametrize("namespace", ["cgroup", "mount"])
@pytest.mark.parametrize("controller", ["memory", "pids"])
def test_hidden_cgroup_is_refused(
    start_qemu: StartQemu, tmp_path: Path, controller: str, namespace: str
) -> None:
    """Check that the tool does not rely on limits that it cannot read."""
    with cgroups(controller, depth=2) as ((outer, inner), unified):
        most = 48 << 20
        if controller == "memory":
            (inner / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(most))
        vm = start_vm(start_qemu, tmp_path, "-m", "64M", prefix=in_group(inner))
        if controller == "pids":
            used_tasks = int((inner / "pids.current").read_text())
            (inner / "pids.max").write_text(str(used_tasks + 1))
        own = outer.with_name(f"{outer.name}-tool")
        own.mkdir()
        mount = next(str(path) for path in outer.parents if path.is_mount())
        hide = f"umount -l {mount} && "
        if namespace == "cgroup":
            kind = "cgroup2" if unified else f"cgroup -o {controller}"
            hide += f"mount -t {kind} none {mount} && "
        unshare = ["unshare", "--mount", *(["--cgroup"] if namespace == "cgroup" else [])]
        prefix = [*in_group(own), *unshare, "sh", "-c", hide + 'exec "$@"', "sh"]
        populate = "--populate=auto" if controller == "memory" else "--populate=resident"
        try:
            for more in ([populate], [populate, "--dry-run"]):
                error = error_of(vm, prefix, *more, status=5, state="prelaunch")
                assert error["code"] == "hidden-cgroup"
                assert f"QEMU's {controller} cgroup " in error["cause"]
                assert "--force" in error["remedy"]
        finally:
            vm.qemu.kill()
            own.rmdir()


def error_of(
    vm: QemuVm, prefix: Sequence[str], *arguments: str, status: int = 1, state: str = "running"
) -> dict[str, str]:
    """Run the tool with a prefix, and return its error."""
    tool = [sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp, "--json"]
    command = [*prefix, *tool, "--populate-only", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert vm.qmp.status() == state
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
