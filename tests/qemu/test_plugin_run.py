# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the plugin detects QEMU, and reports that QEMU does not use KVM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.plugin import ask_status
from support.qemu import QEMU, connect_monitor, kvm_usable

needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")
RUN = (sys.executable, "-m", "qemu_prefault", "run")
#: Paths of the firmware, which QEMU does not find if it is started through a symbolic link.
FIRMWARE = ("-L", "/usr/share/qemu", "-L", "/usr/share/seabios")
BASE = (*FIRMWARE, "-nodefaults", "-no-user-config", "-display", "none", "-m", "64M")
NO_KVM = "does not use KVM"

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[bytes]] = []

    def popen(*command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, **options))
        return running[-1]

    yield popen
    for process in running:
        process.kill()
        process.communicate()


def named(directory: Path, name: str) -> Path:
    """Create a symbolic link to QEMU with this name, and return its path."""
    assert QEMU
    link = directory / name
    link.symlink_to(QEMU)
    return link


def qmp_option(path: Path) -> Sequence[str]:
    return ("-qmp", f"unix:{path},server=on,wait=off")


@needs_kvm
@pytest.mark.parametrize(
    "name", ["qemu-system-x86_64", "qemu-kvm", "qemu-lite-system-x86_64", "kvm", "machine"]
)
def test_options_apply_to_any_program_name(start: Start, tmp_path: Path, name: str) -> None:
    control, qmp = tmp_path / "control", tmp_path / "qmp"
    options = ("-o", f"socket={control}", "-o", "populate=resident")
    program = named(tmp_path, name)
    qemu = start(*RUN, *options, "--", program, *BASE, "-accel", "kvm", *qmp_option(qmp))
    connect_monitor(qmp, qemu).close()
    status = ask_status(control)
    assert (status["pid"], status["populate"]) == (qemu.pid, "resident")


@needs_kvm
def test_options_apply_to_qemu_started_by_a_shell(start: Start, tmp_path: Path) -> None:
    """Check that only QEMU uses the options, which all children of the shell inherit."""
    control, qmp = tmp_path / "control", tmp_path / "qmp"
    script = 'cat /dev/null; "$@"; true'
    shell = start(
        *(*RUN, "-o", f"socket={control}", "--", "sh", "-c", script, "sh", QEMU or ""),
        *(*BASE, "-accel", "kvm", *qmp_option(qmp)),
    )
    monitor = connect_monitor(qmp, shell)
    assert ask_status(control)["pid"] != shell.pid
    monitor.execute("quit")
    _, errors = shell.communicate(timeout=20)
    assert NO_KVM not in errors.decode()


@needs_kvm
@pytest.mark.parametrize("beside", ["", "/nonexistent.so"])
def test_children_of_qemu_inherit_no_options(start: Start, tmp_path: Path, beside: str) -> None:
    qmp, seen = tmp_path / "qmp", tmp_path / "environment"
    environment = {**os.environ, "LD_PRELOAD": beside} if beside else None
    qemu = start(
        *(*RUN, "-o", "socket=off", "--", QEMU or "", *BASE, "-accel", "kvm", *qmp_option(qmp)),
        env=environment,
    )
    monitor = connect_monitor(qmp, qemu)
    monitor.execute("migrate", uri=f"exec:env >{seen}.new; mv {seen}.new {seen}; cat >/dev/null")
    monitor.wait_event("STOP")
    text = seen.read_text()
    assert "PATH=" in text
    assert "QEMU_PREFAULT_OPTIONS" not in text
    assert ("LD_PRELOAD" in text) == bool(beside)


@needs_kvm
@pytest.mark.parametrize("count", [10, 300, 700])
def test_vm_is_found_with_many_inherited_descriptors(
    start: Start, tmp_path: Path, count: int
) -> None:
    control, qmp = tmp_path / "control", tmp_path / "qmp"
    null = os.open("/dev/null", os.O_RDONLY)
    inherited = [os.dup(null) for _ in range(count)]
    try:
        qemu = start(
            *(QEMU or "", *BASE, "-accel", "kvm", *qmp_option(qmp)),
            *("-plugin", f"{plugin_path()},socket={control}"),
            pass_fds=inherited,
        )
    finally:
        for fd in (null, *inherited):
            os.close(fd)
    connect_monitor(qmp, qemu).close()
    assert ask_status(control)["kvm"]


# --- "this QEMU does not use KVM" ---


def finish(*command: str | Path, status: int = 0) -> str:
    """Run a command, send quit to QEMU's monitor, and return the command's stderr."""
    done = subprocess.run(command, input=b"quit\n", capture_output=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr.decode()


def quitting(*arguments: str) -> Sequence[str]:
    """Return arguments for a QEMU whose monitor reads stdin."""
    return (*BASE, "-monitor", "stdio", *arguments)


@pytest.mark.parametrize("how", ["run", "plugin"])
@pytest.mark.parametrize("name", ["qemu-system-x86_64", "qemu-kvm"])
def test_tcg_is_reported_once(how: str, name: str, tmp_path: Path) -> None:
    program = named(tmp_path, name)
    arguments = quitting("-accel", "tcg")
    if how == "run":
        errors = finish(*RUN, "--", program, *arguments)
    else:
        errors = finish(program, "-plugin", f"{plugin_path()}", *arguments)
    assert errors.count(NO_KVM) == 1


def test_tcg_started_by_a_shell_is_reported_once() -> None:
    arguments = quitting("-accel", "tcg")
    command = ("sh", "-c", 'ls /; "$@"; true', "sh", QEMU or "", *arguments)
    assert finish(*RUN, "--", *command).count(NO_KVM) == 1


def test_other_programs_report_nothing() -> None:
    assert finish(*RUN, "-o", "log=on", "--", "sh", "-c", "ls /; true") == ""


@needs_kvm
@pytest.mark.parametrize("how", ["run", "plugin"])
def test_kvm_reports_nothing(how: str) -> None:
    arguments = quitting("-accel", "kvm")
    if how == "run":
        errors = finish(*RUN, "-o", "socket=off", "--", QEMU or "", *arguments)
    else:
        errors = finish(QEMU or "", "-plugin", f"{plugin_path()},socket=off", *arguments)
    assert NO_KVM not in errors


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (0, ("--version",)),
        (1, ("-accel", "kvm", "-device", "no-such-device")),
        (1, ("-accel", "no-such-accelerator")),
    ],
)
def test_qemu_without_a_guest_reports_nothing(status: int, arguments: Sequence[str]) -> None:
    command = (*RUN, "-o", "socket=off", "--", QEMU or "", *quitting(*arguments))
    assert NO_KVM not in finish(*command, status=status)


@pytest.mark.parametrize("accel", ["tcg", pytest.param("kvm", marks=needs_kvm)])
@pytest.mark.parametrize("how", ["run", "plugin"])
def test_parents_of_daemon_report_nothing(how: str, accel: str, tmp_path: Path) -> None:
    """Check that the processes that fork QEMU's daemon report nothing.

    With ``-daemonize``, QEMU forks twice (os_daemonize() in os-posix.c), and only the last process
    creates the VM.
    """
    pid_file, qmp, control = (tmp_path / name for name in ("pid", "qmp", "control"))
    arguments = (*BASE, "-S", "-accel", accel, "-daemonize", "-pidfile", str(pid_file))
    try:
        if how == "run":
            options = ("-o", f"socket={control}")
            errors = finish(*RUN, *options, "--", QEMU or "", *arguments, *qmp_option(qmp))
        else:
            plugin = ("-plugin", f"{plugin_path()},socket={control}")
            errors = finish(QEMU or "", *plugin, *arguments, *qmp_option(qmp))
        assert errors.count(NO_KVM) == (1 if (accel, how) == ("tcg", "plugin") else 0)
        if accel == "kvm":
            assert ask_status(control)["pid"] == int(pid_file.read_text())
    finally:
        with suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
