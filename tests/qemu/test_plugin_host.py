# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin in a QEMU with TCG, or with a KVM that lacks the ioctl.

tests/nested/test_plugin.py tests the plugin with the real ioctl.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import find_control_socket, plugin_path
from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for
from support.qemu import QEMU, Qemu, StartQemu, kvm_usable, run_tool
from support.qmp import QmpClient

needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")
MIB = 1 << 20


def plugin(*options: str) -> list[str]:
    return ["-plugin", ",".join([str(plugin_path()), *options])]


def start(start_qemu: StartQemu, *options: str) -> Qemu:
    """Start a QEMU under KVM with the plugin, and wait until its machine is complete."""
    qemu = start_qemu("-m", "64M", *plugin(*options), accel="kvm")
    QmpClient(qemu.qmp).close()
    return qemu


class Control:
    """A simple client for the plugin's control socket."""

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rw")

    def send(self, *lines: str) -> None:
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()

    def receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._file.readline())
        return answer

    def ask(self, *lines: str) -> dict[str, Any]:
        self.send(*lines)
        return self.receive()


@pytest.fixture
def control(start_qemu: StartQemu, tmp_path: Path) -> Iterator[Callable[..., Control]]:
    clients: list[Control] = []

    def connect() -> Control:
        clients.append(Control(tmp_path / "control"))
        return clients[-1]

    start(start_qemu, f"socket={tmp_path}/control")
    yield connect
    for client in clients:
        client.socket.close()


def run_qemu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a QEMU that quits immediately."""
    assert QEMU
    return subprocess.run(
        [QEMU, "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", *arguments],
        input='{"execute": "qmp_capabilities"}{"execute": "quit"}',
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("way", ["plugin", "preload"])
def test_no_kvm_disables_the_plugin(way: str) -> None:
    if way == "plugin":
        result = run_qemu("-accel", "tcg", *plugin())
    else:
        result = run_qemu("-accel", "tcg", LD_PRELOAD=str(plugin_path()))
    assert result.returncode == 0
    assert "does not use KVM" in result.stderr


@needs_kvm
def test_daemonized_kvm_is_seen(tmp_path: Path) -> None:
    """Check that the processes that fork QEMU's daemon report nothing."""
    assert QEMU
    pidfile = tmp_path / "pid"
    machine = ["-nodefaults", "-display", "none", "-S", "-accel", "kvm", "-m", "64M"]
    result = subprocess.run(
        [QEMU, *machine, "-daemonize", "-pidfile", str(pidfile)],
        env={**os.environ, "LD_PRELOAD": str(plugin_path())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    os.kill(int(pidfile.read_text()), signal.SIGKILL)
    assert "does not use KVM" not in result.stderr


@pytest.mark.parametrize(
    "option",
    ["colour=red", "keep=maybe", "populate=some", "hold=-1", "hold=soon", "socket=x", "socket=~x"],
)
def test_unknown_option_ends_qemu(option: str) -> None:
    result = run_qemu("-accel", "tcg", *plugin(option))
    assert result.returncode != 0
    assert option in result.stderr and "populate=auto|all|resident" in result.stderr


@needs_kvm
def test_unsupported_kvm_is_reported(control: Callable[..., Control]) -> None:
    status = control().ask("status")
    if status["pre_fault_memory"]:
        pytest.skip("this KVM can prefault; see tests/nested/test_plugin.py")
    assert status["kvm"] and status["pending"] == 0
    assert {slot["why"] for slot in status["slots"]} == {"this KVM has no KVM_PRE_FAULT_MEMORY"}


@needs_kvm
def test_slots_match_the_monitor(start_qemu: StartQemu, tmp_path: Path) -> None:
    path = tmp_path / "control"
    qemu = start(start_qemu, f"socket={path}")
    monitor = QmpClient(qemu.qmp)
    mtree = monitor.execute("human-monitor-command", command_line="info mtree -f")
    view = next(part for part in mtree.split("FlatView") if 'AS "memory"' in part)
    shown = set()
    for line in view.splitlines():
        if line.rstrip().endswith("KVM"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            shown.add((first, last + 1 - first))
    slots = Control(path).ask("status")["slots"]
    assert {(slot["gpa"], slot["size"]) for slot in slots if slot["as"] == 0} == shown


@needs_kvm
def test_socket_is_private_and_removed_with_qemu(start_qemu: StartQemu, tmp_path: Path) -> None:
    path = tmp_path / "control"
    qemu = start(start_qemu, f"socket={path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    QmpClient(qemu.qmp).execute("quit")
    assert qemu.process.wait(20) == 0
    assert not path.exists()


@needs_kvm
def test_stale_socket_is_reused(start_qemu: StartQemu, tmp_path: Path) -> None:
    path = tmp_path / "control"
    for _ in range(2):
        qemu = start(start_qemu, f"socket={path}")
        assert Control(path).ask("status")["pid"] == qemu.pid
        qemu.kill()
        assert path.exists()


@needs_kvm
def test_other_user_is_rejected(control: Callable[..., Control], tmp_path: Path) -> None:
    """Check that other users are rejected even if the socket's mode allows them."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    control()
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    (tmp_path / "control").chmod(0o666)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(65534)
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(20)
            client.connect(str(tmp_path / "control"))
            client.sendall(b"status\n")
            status = 0 if client.recv(1) == b"" else 2
        except ConnectionError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_kvm
@pytest.mark.parametrize("request_line", ["", "hello", "populate some", "work x", "status please"])
def test_unknown_command_is_rejected(control: Callable[..., Control], request_line: str) -> None:
    client = control()
    answer = client.ask(request_line)
    assert "the request is unknown" in answer["error"] and answer["code"] == "unknown-request"
    assert client.ask("status")["plugin"] == 1


@needs_kvm
def test_policy_and_pause_persist(control: Callable[..., Control]) -> None:
    client = control()
    assert client.ask("populate resident")["ok"] and client.ask("pause")["ok"]
    status = control().ask("status")
    assert (status["populate"], status["held"], status["keeping"]) == ("resident", "paused", False)
    assert client.ask("resume")["ok"]
    assert control().ask("status")["keeping"] is True


@needs_kvm
def test_batch_populates_and_reports_each_range(control: Callable[..., Control]) -> None:
    client = control()
    ram = max(client.ask("status")["slots"], key=lambda slot: slot["size"])
    hva, page = ram["hva"], 4096
    client.send("work 3 65536", f"0 0 {hva} {MIB}", f"0 0 {page} {page}", f"0 0 {hva} {2 * MIB}")
    assert client.receive()["ok"]
    while "done" not in (answer := client.receive()):
        assert answer["progress"] <= 3 * MIB
    assert answer["done"][0] == [MIB, 0] and answer["done"][2] == [2 * MIB, 0]
    assert answer["done"][1][0] == 0 and answer["done"][1][1]  # nothing is mapped there
    assert client.ask("status")["counters"]["populated"] == 3 * MIB


@needs_kvm
@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("bad-range", ("work 1 65536", "0 0 1 4096")),
        ("bad-range", ("work 1 65536", "9 0 4096 4096")),
        ("bad-range", ("work 1 65536", "0 7 4096 4096")),
        ("bad-range", ("work 2 65536", "nonsense", "0 0 4096 4096")),
        ("bad-chunk", ("work 1 100", "0 0 4096 4096")),
    ],
)
def test_bad_batch_is_rejected_whole(
    control: Callable[..., Control], code: str, lines: tuple[str, ...]
) -> None:
    client = control()
    answer = client.ask(*lines)
    assert answer["error"] and answer["code"] == code
    assert client.ask("status")["counters"]["populated"] == 0


@needs_kvm
def test_batch_ends_with_its_client(control: Callable[..., Control]) -> None:
    client = control()
    slot = max(client.ask("status")["slots"], key=lambda slot: slot["size"])
    many = [f"0 0 {slot['hva']} {slot['size']}"] * 20000
    client.send(f"work {len(many)} 4096", *many)
    assert client.receive()["ok"]
    refused = control().ask("work 0 4096")
    assert "another batch" in refused["error"] and refused["code"] == "busy"
    client.socket.shutdown(socket.SHUT_RDWR)
    other = control()
    while "error" in (answer := other.ask("work 0 4096")):
        assert "another batch" in answer["error"]
    assert answer["ok"]


@needs_kvm
def test_vcpu_that_has_run_is_no_longer_lent(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that the plugin refuses work for a lent vCPU after the vCPU has run.

    The ioctl must not run after KVM_RUN has returned and before QEMU has read KVM_RUN's result.
    """
    qemu = start(start_qemu, f"socket={tmp_path}/control")
    client, monitor = Control(tmp_path / "control"), QmpClient(qemu.qmp)

    def prefault(request: str) -> int:
        client.send(f"{request} 1 4096", "0 1 0 4096")
        assert client.receive()["ok"]
        while "done" not in (answer := client.receive()):
            pass
        return int(answer["done"][0][1])

    def run_guest() -> None:
        monitor.execute("cont")
        wait_for(lambda: client.ask("status")["vcpus"][0]["running"], "the vCPU runs")
        monitor.execute("stop")

    assert client.ask("lend")["ok"]
    assert prefault("work-lent") == errno.EOPNOTSUPP  # the error of this host's KVM
    run_guest()
    assert prefault("work-lent") == errno.EBUSY
    assert prefault("work") == errno.EOPNOTSUPP
    run_guest()
    assert client.ask("lend")["ok"]
    assert prefault("work-lent") == errno.EOPNOTSUPP


@needs_kvm
def test_tool_uses_the_plugin(start_qemu: StartQemu) -> None:
    """Check that the tool uses the plugin instead of ptrace if the plugin is loaded."""
    qemu = start(start_qemu)
    found = find_control_socket(Process.find(qemu.pid))
    assert found and found.exists()
    result = run_tool(qemu, "--populate-only")
    assert result.status == 0, result.stderr
    assert result.report["agent"] == "plugin"
    assert result.report["bytes"]["remaining"] == 0
    assert result.report["bytes"]["populated"] > 60 * MIB


def test_tool_without_plugin_names_the_remedy(start_qemu: StartQemu) -> None:
    result = run_tool(start_qemu("-m", "64M"), "--populate-only", "--agent", "plugin")
    assert result.status == 4
    assert result.error["code"] == "no-plugin"
    assert "plugin-path" in result.error["remedy"]


@needs_kvm
def test_followers_get_events(control: Callable[..., Control]) -> None:
    follower, client = control(), control()
    assert follower.ask("follow")["ok"]
    client.ask("pause")
    assert follower.receive()["event"] == "held"
    client.ask("resume")
    assert follower.receive()["event"] == "released"
    assert select.select([follower.socket], [], [], 0)[0] == []
