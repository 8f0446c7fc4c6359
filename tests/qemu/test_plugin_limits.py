# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin never uses the last tasks, descriptors and address space of QEMU.

In each test, a QEMU without the plugin runs with the same limit.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import find_control_socket, plugin_path
from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for
from support.limits import cgroups, in_group
from support.plugin import capable_prefix, wait_started
from support.qemu import MIB, Qemu, StartQemu, kvm_usable
from support.qmp import QmpClient

pytestmark = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")

RESERVE = 64
NOTHING = "qemu-prefault: the plugin does nothing, because"
BORROWS = "qemu-prefault: the plugin creates no prefault vCPUs, but uses the guest's vCPUs, because"
VCPUS = 4


class Starter:
    """Starts a QEMU with and without the plugin, with the same limits."""

    def __init__(self, start_qemu: StartQemu, directory: Path) -> None:
        self._start = start_qemu
        self.control = directory / "control"
        disk = directory / "disk"
        disk.write_bytes(bytes(MIB))
        self._arguments = [
            *("-m", "64M", "-smp", str(VCPUS)),
            *("-drive", f"file={disk},format=raw,if=none,id=d0,aio=threads,file.locking=off"),
            *("-device", "virtio-blk-pci,drive=d0"),
        ]

    def __call__(
        self,
        *prefix: str,
        plugin: bool = True,
        options: Sequence[str] = (),
        paused: bool = False,
    ) -> Qemu:
        option = ",".join([str(plugin_path()), f"socket={self.control}", *options])
        return self._start(
            *self._arguments,
            *(["-plugin", option] if plugin else []),
            accel="kvm",
            paused=paused,
            prefix=[*capable_prefix(), *prefix],
        )


@pytest.fixture
def start(start_qemu: StartQemu, tmp_path: Path) -> Starter:
    return Starter(start_qemu, tmp_path)


@pytest.fixture
def group() -> Iterator[Path]:
    with cgroups("pids") as ((directory,), _):
        yield directory


def check_running(qemu: Qemu) -> None:
    """Check that the guest runs and that QEMU can start a thread of its thread pool."""
    with closing(QmpClient(qemu.qmp)) as qmp:
        qmp.execute("human-monitor-command", command_line='qemu-io d0 "read 0 4096"')
        assert qmp.status() == "running"


def stop(qemu: Qemu) -> list[str]:
    """Kill QEMU, and return the plugin's lines."""
    qemu.process.kill()
    stderr = qemu.process.communicate(timeout=20)[1].decode()
    return [line for line in stderr.splitlines() if line.startswith("qemu-prefault:")]


def tasks(directory: Path) -> int:
    return int((directory / "pids.current").read_text())


def test_last_tasks_are_left(start: Starter, group: Path) -> None:
    qemu = start(*in_group(group), plugin=False)
    check_running(qemu)
    most = tasks(group)
    stop(qemu)
    (group / "pids.max").write_text(str(most))
    qemu = start(*in_group(group), options=["vcpu=prefault"])
    check_running(qemu)
    assert not start.control.exists()
    (line,) = stop(qemu)
    assert line.startswith(
        f"{NOTHING} it needs 4 tasks and must leave {RESERVE + VCPUS} for QEMU, but pids.max of "
        f"{group} is {most}, of which "
    )


def test_few_tasks_suffice_to_borrow_vcpus(start: Starter, group: Path) -> None:
    (group / "pids.max").write_text("20")
    qemu = start(*in_group(group))
    check_running(qemu)
    (line,) = stop(qemu)
    found = re.search(r"of which (\d+) are in use", line)
    assert found
    (group / "pids.max").write_text(str(int(found[1]) + RESERVE + VCPUS + 3))
    qemu = start(*in_group(group))
    status = wait_started(qemu, start.control)
    assert status["prefault_vcpus"] == []
    assert f"pids.max of {group} is" in status["no_prefault_vcpus"]
    check_running(qemu)
    (line,) = stop(qemu)
    assert line == f"{BORROWS} {status['no_prefault_vcpus']}"


def ask(path: Path, *lines: str) -> list[dict[str, Any]]:
    """Send a request, and return all replies up to the end of the connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall("".join(f"{line}\n" for line in lines).encode())
        with client.makefile() as answers:
            found = [json.loads(answers.readline())]
            while "done" not in found[-1] and "ok" in found[0]:
                found.append(json.loads(answers.readline()))
    return found


def test_client_without_task_gets_an_error(start: Starter, group: Path) -> None:
    qemu = start(*in_group(group))
    wait_started(qemu, start.control)
    # The thread of the last client may still exit.
    wait_for(lambda: len(os.listdir(f"/proc/{qemu.pid}/task")) == tasks(group), "tasks are counted")
    (group / "pids.max").write_text(str(tasks(group)))
    (answer,) = ask(start.control, "status")
    assert answer["code"] == "no-thread"
    assert f"pids.max of {group} is" in answer["error"]
    (group / "pids.max").write_text("max")
    assert ask(start.control, "status")[0]["plugin"] == 1


def test_batch_starts_only_as_many_threads_as_fit(start: Starter, group: Path) -> None:
    qemu = start(*in_group(group))
    slot = wait_started(qemu, start.control)["slots"][0]
    wait_for(lambda: len(os.listdir(f"/proc/{qemu.pid}/task")) == tasks(group), "tasks are counted")
    (group / "pids.max").write_text(str(tasks(group) + 4))
    parts = [f"{vcpu} 0 {slot['hva'] + vcpu * 4096} 4096" for vcpu in range(VCPUS)]
    replies = ask(start.control, f"work {VCPUS} 4096", *parts)
    assert replies[-1]["done"] == [[4096, 0]] * VCPUS


@pytest.mark.parametrize("limit", [28, 40, 80])
def test_last_descriptors_are_left(start: Starter, limit: int) -> None:
    prefix = ["prlimit", f"--nofile={limit}:{limit}"]
    check_running(start(*prefix, plugin=False))
    qemu = start(*prefix)
    check_running(qemu)
    assert not start.control.exists()
    (line,) = stop(qemu)
    assert line.startswith(NOTHING)
    assert f"but RLIMIT_NOFILE (ulimit -n) is {limit}, of which " in line


def test_cgroup_levels_take_one_descriptor_each(start: Starter) -> None:
    qemu = start()
    wait_started(qemu, start.control)
    control = start(plugin=False)
    check_running(control)
    here = targets(qemu)
    groups = [target for target in here if target.startswith("/sys/fs/cgroup")]
    assert all(Path(target).is_dir() for target in groups)
    assert len(here) - len(groups) - len(targets(control)) <= 14


def targets(qemu: Qemu) -> list[str]:
    return [os.readlink(entry) for entry in Path(f"/proc/{qemu.pid}/fd").iterdir()]


def test_missing_descriptors_are_named(start: Starter) -> None:
    """Check the reason if QEMU has used its descriptors when the guest starts."""
    qemu = start(paused=True)
    with closing(QmpClient(qemu.qmp)) as qmp:
        _, hard = resource.prlimit(qemu.pid, resource.RLIMIT_NOFILE)
        most = max(map(int, os.listdir(f"/proc/{qemu.pid}/fd"))) + 8
        resource.prlimit(qemu.pid, resource.RLIMIT_NOFILE, (most, hard))
        qmp.execute("cont")
    status = wait_started(qemu, start.control)
    assert status["prefault_vcpus"] == []
    assert f"RLIMIT_NOFILE (ulimit -n) is {most}, of which" in status["no_prefault_vcpus"]
    assert stop(qemu) == [f"{BORROWS} {status['no_prefault_vcpus']}"]


def size(qemu: Qemu, field: str) -> int:
    """Return the size in bytes that a field of QEMU's /proc/PID/status shows."""
    text = Path(f"/proc/{qemu.pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found[1]) << 10


def test_plugin_takes_little_address_space(start: Starter) -> None:
    """Check that the plugin's threads have small stacks and no malloc arenas."""
    control = start(plugin=False)
    check_running(control)
    qemu = start()
    check_running(qemu)
    wait_for(lambda: "prefault-vcpu" in names(qemu), "the plugin's threads run")
    assert size(qemu, "VmSize") - size(control, "VmSize") < 16 * MIB


def names(qemu: Qemu) -> set[str]:
    found = set()
    for task in Path(f"/proc/{qemu.pid}/task").iterdir():
        found.add((task / "comm").read_text().strip())
    return found


@pytest.mark.parametrize(("option", "field"), [("as", "VmPeak"), ("data", "VmData")])
def test_last_address_space_is_left(start: Starter, option: str, field: str) -> None:
    control = start(plugin=False)
    check_running(control)
    limit = size(control, field) + 4 * MIB
    qemu = start("prlimit", f"--{option}={limit}")
    check_running(qemu)
    (line,) = stop(qemu)
    assert line.startswith(NOTHING) and f"RLIMIT_{option.upper()}" in line


@pytest.fixture(scope="module")
def no_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    path = tmp_path_factory.mktemp("threads") / "no_threads.so"
    source = Path(__file__).with_name("no_threads.c")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", path, "-ldl"], check=True)
    return path


def without_thread(library: Path, number: int) -> list[str]:
    return ["env", f"LD_PRELOAD={library}", f"FAIL_THREAD={number}"]


def test_failed_watchdog_disables_the_plugin(start: Starter, no_threads: Path) -> None:
    qemu = start(*without_thread(no_threads, 1), options=["vcpu=prefault"])
    check_running(qemu)
    assert not start.control.exists()
    (line,) = stop(qemu)
    assert line.startswith(f"{NOTHING} it cannot start a thread: Resource temporarily unavailable")


@pytest.mark.parametrize("choice", ["auto", "prefault"])
def test_failed_prefault_thread_is_the_reason(
    start: Starter, no_threads: Path, choice: str
) -> None:
    qemu = start(*without_thread(no_threads, 2), options=[f"vcpu={choice}"])
    reason = wait_started(qemu, start.control)["no_prefault_vcpus"]
    assert reason.startswith("it cannot start a thread: Resource temporarily unavailable. Raise")
    assert stop(qemu) == [f"{BORROWS} {reason}"]


def test_failed_control_thread_leaves_no_socket(start: Starter, no_threads: Path) -> None:
    qemu = start(*without_thread(no_threads, 3))
    check_running(qemu)
    assert not start.control.exists()
    assert find_control_socket(Process.find(qemu.pid)) is None
    (line,) = stop(qemu)
    assert line.startswith("qemu-prefault: the plugin has no control socket, because")
