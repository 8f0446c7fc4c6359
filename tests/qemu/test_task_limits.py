# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that helpers leave tasks for QEMU, which aborts if it has none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.process import leftovers
from support.qemu import MIB, QemuVm, StartQemu, start_tool, start_vm

HIERARCHIES = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


@pytest.fixture
def pids_group() -> Iterator[Path]:
    """Yield a cgroup with the pids controller."""
    for root in HIERARCHIES:
        group = root / f"prefault-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "pids.max").exists():
            break
        group.rmdir()
    else:
        pytest.skip("cannot create a cgroup with the pids controller")
    yield group
    group.rmdir()


@pytest.fixture(params=["attach", "plugin"])
def vm(
    request: pytest.FixtureRequest, start_qemu: StartQemu, tmp_path: Path, pids_group: Path
) -> Iterator[QemuVm]:
    """Yield a QEMU in the cgroup, once per agent that starts threads in QEMU."""
    with_plugin = request.param == "plugin"
    plugin = ["-plugin", str(plugin_path())] if with_plugin else []
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * MIB))
    drive = f"file={disk},format=raw,if=none,id=d0,aio=threads"
    arguments = ("-drive", drive, "-device", "virtio-blk-pci,drive=d0")
    prefix = ["sh", "-c", f'echo $$ >{pids_group}/cgroup.procs; exec "$@"', "sh"]
    vm = start_vm(
        start_qemu,
        tmp_path,
        *("-m", "1G", "-smp", "4"),
        *arguments,
        *plugin,
        prefix=prefix,
        accel="kvm" if with_plugin else "tcg",
    )
    yield vm
    vm.qemu.kill()


def tasks(group: Path) -> int:
    return int((group / "pids.current").read_text())


def leave(group: Path, count: int) -> None:
    # This count includes the workers in QEMU's thread pool, which exit after 10 s without work.
    (group / "pids.max").write_text(str(tasks(group) + count))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_tasks_is_refused(vm: QemuVm, pids_group: Path, count: int) -> None:
    leave(pids_group, count)
    reason = f"only {count} more threads, because pids.max of {pids_group}"
    for more in ([], ["--dry-run"]):
        result = vm.prefault("--populate-only", *more)
        assert result.status == 5, result.stderr
        assert result.error["code"] == "no-tasks"
        assert reason in result.error["cause"]
    probed = {each["check"]: each for each in vm.command("probe").report["findings"]}
    for check in ("attach", "populate"):
        assert probed[check]["verdict"] == "no" and reason in probed[check]["text"]
    assert vm.qmp.status() == "prelaunch"


def test_last_tasks_are_left_to_qemu(vm: QemuVm, pids_group: Path) -> None:
    """Check that QEMU can start a thread during a run."""
    leave(pids_group, 4)
    before = tasks(pids_group)
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    while tool.running() and tasks(pids_group) == before:
        time.sleep(0.001)
    vm.qmp.execute("human-monitor-command", command_line='qemu-io d0 "read 0 4096"')
    most = tasks(pids_group)
    result = tool.finish()
    assert result.status == 0, result.stderr
    assert most <= before + 2
    assert vm.qmp.status() == "prelaunch"
    assert leftovers(vm.pid) == []


def test_many_vcpus_have_few_helpers(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_vm(start_qemu, tmp_path, "-m", "256M", "-smp", "64")
    before = len(os.listdir(f"/proc/{vm.pid}/task"))
    most = 0
    tool = start_tool(vm.qemu, "--populate-only", "--chunk", "4096")
    while tool.running():
        most = max(most, len(os.listdir(f"/proc/{vm.pid}/task")))
        time.sleep(0.005)
    assert tool.finish().status == 0
    assert before < most <= before + 8


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as another user")
def test_limit_of_a_user_applies_in_a_user_namespace(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that capabilities in a user namespace do not exempt QEMU from ``ulimit -u``."""
    for directory in tmp_path.parents[:-2]:
        directory.chmod(directory.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    user = ["--reuid", "54321", "--regid", "54321", "--clear-groups"]
    prefix = ["prlimit", "--nproc=8", "setpriv", *user, "unshare", "--user", "--map-root-user"]
    before = os.umask(0)  # QEMU connects to a socket of this process
    try:
        vm = start_vm(start_qemu, tmp_path, "-m", "64M", "-smp", "4", prefix=prefix)
    finally:
        os.umask(before)
    result = vm.prefault("--populate-only")
    assert result.status == 5, result.stdout
    assert "the task limit of user 54321 (ulimit -u) is 8" in result.error["cause"]
    assert "can start only" in result.error["cause"]
