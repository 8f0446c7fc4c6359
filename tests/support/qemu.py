# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a real QEMU on this machine, and run the tool on it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .qmp import QmpClient
from .tool import Result, Tool

MIB = 1 << 20
QEMU = shutil.which("qemu-system-x86_64")


def kvm_usable() -> bool:
    """Return whether /dev/kvm can be opened."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


@dataclass
class Qemu:
    """A running QEMU, with the path of its QMP socket and its arguments."""

    process: subprocess.Popen[bytes]
    qmp: str
    accel: str
    arguments: Sequence[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """Kill QEMU with SIGKILL and wait until it has exited."""
        self.process.kill()
        self.process.wait(20)

    def pause(self) -> None:
        """Stop the QEMU process with SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Continue the QEMU process with SIGCONT."""
        self.process.send_signal(signal.SIGCONT)


def _await_listening(process: subprocess.Popen[bytes], ready: socket.socket) -> socket.socket:
    """Wait until QEMU connects to ``ready``, after its other sockets listen.

    :returns: The connection. While QEMU sends a greeting, it can crash if the connection is closed
        (docs/design/killed-at-any-instant.md).
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ready.fileno(), pidfd], [], [], 30)
    finally:
        os.close(pidfd)
    if ready.fileno() in readable:
        return ready.accept()[0]
    process.kill()
    _, stderr = process.communicate()
    text = stderr.decode(errors="replace")
    raise AssertionError(f"QEMU did not start: {text}")


def launch(
    directory: Path,
    number: int,
    arguments: Sequence[str],
    accel: str,
    paused: bool,
    *,
    prefix: Sequence[str] = (),
) -> Qemu:
    """Start a QEMU with its sockets in a directory, and wait for the QMP socket.

    :param number: A number that no other QEMU with sockets in this directory uses.
    :param prefix: A program that executes QEMU, and its arguments.
    """
    qmp, ready_path = str(directory / f"qmp{number}"), str(directory / f"ready{number}")
    ready = socket.socket(socket.AF_UNIX)
    ready.bind(ready_path)
    ready.listen(1)
    command = [*prefix, QEMU or "", "-nodefaults", "-display", "none", "-accel", accel]
    command += ["-S"] if paused else []
    command += ["-qmp", f"unix:{qmp},server=on,wait=off", *arguments]
    # QEMU creates chardevs in order. When this chardev connects, the -qmp socket is listening.
    command += ["-chardev", f"socket,id=ready,path={ready_path}", "-mon", "ready,mode=control"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        connection = _await_listening(process, ready)
    finally:
        ready.close()
    qemu = Qemu(process, qmp, accel, arguments)
    weakref.finalize(qemu, connection.close)
    return qemu


def connect_monitor(path: str | Path, process: subprocess.Popen[bytes]) -> QmpClient:
    """Connect to the monitor of a QEMU that the test started.

    Retry for up to 20 s.
    """
    for _ in range(400):
        with contextlib.suppress(OSError):
            return QmpClient(str(path))
        assert process.poll() in (None, 0), "QEMU exited"
        time.sleep(0.05)
    raise AssertionError("QEMU did not create its monitor within 20 seconds")


#: The ``start_qemu`` fixture. It takes QEMU's arguments, and the keyword arguments ``accel``,
#: ``paused`` and ``prefix`` of :func:`launch`.
StartQemu = Callable[..., Qemu]


def start_tool(qemu: Qemu, *arguments: str) -> Tool:
    return Tool(["--qmp", qemu.qmp, "--json", *arguments])


def run_tool(qemu: Qemu, *arguments: str) -> Result:
    return start_tool(qemu, *arguments).finish()


@dataclass
class QemuVm:
    """A QEMU with a second monitor, which the tool does not use."""

    qemu: Qemu
    qmp: QmpClient

    @property
    def pid(self) -> int:
        return self.qemu.pid

    @property
    def vcpu(self) -> int:
        """The thread id of the first vCPU."""
        return int(self.qmp.execute("query-cpus-fast")[0]["thread-id"])

    def prefault(self, *arguments: str) -> Result:
        return run_tool(self.qemu, *arguments)

    def command(self, name: str, *arguments: str) -> Result:
        """Run the ``probe``, ``map`` or ``stats`` command on this QEMU."""
        return Tool([name, "--qmp", self.qemu.qmp, "--json", *arguments]).finish()


def start_vm(
    start_qemu: StartQemu,
    tmp_path: Path,
    *arguments: str,
    accel: str = "tcg",
    paused: bool = True,
    prefix: Sequence[str] = (),
) -> QemuVm:
    number = len(list(tmp_path.glob("aside*")))
    aside = tmp_path / f"aside{number}"
    monitor = ("-qmp", f"unix:{aside},server=on,wait=off")
    qemu = start_qemu(*monitor, *arguments, accel=accel, paused=paused, prefix=prefix)
    return QemuVm(qemu, QmpClient(str(aside)))
