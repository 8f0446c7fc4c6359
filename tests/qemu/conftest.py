# SPDX-License-Identifier: GPL-2.0-or-later
"""Real QEMUs to test against: started stopped (-S), on a private socket, reaped at the end."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

QEMU = shutil.which("qemu-system-x86_64")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without QEMU this directory has nothing to say."""
    if QEMU is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="qemu-system-x86_64 is not installed"))


def kvm_usable() -> bool:
    """Whether /dev/kvm can be opened here."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


@dataclass
class Qemu:
    """A running QEMU, the socket it listens on, and what it was started with."""

    process: subprocess.Popen[bytes]
    qmp: str
    accel: str
    arguments: Sequence[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """Kill it with SIGKILL and wait until it is gone."""
        self.process.kill()
        self.process.wait(20)

    def pause(self) -> None:
        """Stop the whole process, as a debugger or an overloaded host does."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)


def _await_listening(process: subprocess.Popen[bytes], ready: socket.socket) -> None:
    """Return once QEMU has connected to our socket, which it does after all it listens on."""
    pidfd = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ready.fileno(), pidfd], [], [], 30)
    finally:
        os.close(pidfd)
    if ready.fileno() in readable:
        ready.accept()[0].close()
        return
    process.kill()
    _, stderr = process.communicate()
    text = stderr.decode(errors="replace")
    raise AssertionError(f"QEMU did not start: {text}")


StartQemu = Callable[..., Qemu]


@pytest.fixture
def start_qemu(tmp_path: Path) -> Iterator[StartQemu]:
    """Start QEMUs: ``start_qemu("-m", "256M", accel="tcg")`` returns when QMP is there."""
    running: list[Qemu] = []

    def start(*arguments: str, accel: str = "tcg", paused: bool = True) -> Qemu:
        if accel == "kvm" and not kvm_usable():
            pytest.skip("/dev/kvm is not usable")
        number = len(running)
        qmp, ready_path = str(tmp_path / f"qmp{number}"), str(tmp_path / f"ready{number}")
        ready = socket.socket(socket.AF_UNIX)
        ready.bind(ready_path)
        ready.listen(1)
        command = [QEMU or "", "-nodefaults", "-display", "none", "-accel", accel]
        command += ["-S"] if paused else []
        command += ["-qmp", f"unix:{qmp},server=on,wait=off", *arguments]
        # Chardevs are created in the order given: when this one connects, -qmp listens.
        command += ["-chardev", f"socket,id=ready,path={ready_path}", "-mon", "ready,mode=control"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            _await_listening(process, ready)
        finally:
            ready.close()
        qemu = Qemu(process, qmp, accel, arguments)
        running.append(qemu)
        return qemu

    yield start
    for qemu in running:
        qemu.process.kill()
        qemu.process.communicate()


@pytest.fixture(params=["tcg", "kvm"])
def accel(request: pytest.FixtureRequest) -> str:
    """Both accelerators; KVM is skipped where it is not usable."""
    if request.param == "kvm" and not kvm_usable():
        pytest.skip("/dev/kvm is not usable")
    return str(request.param)
