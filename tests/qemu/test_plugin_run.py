# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process the plugin takes for QEMU, and what it reports if that one has no VM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.qemu import QEMU, connect_monitor, kvm_usable

needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")
#: QEMU looks for firmware beside its program first.
FIRMWARE = ("-L", "/usr/share/qemu", "-L", "/usr/share/seabios")
BASE = (*FIRMWARE, "-nodefaults", "-no-user-config", "-display", "none", "-m", "64M")

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


def ask_status(path: Path) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b"status\n")
        with client.makefile() as answers:
            answer: dict[str, Any] = json.loads(answers.readline())
    return answer


def qmp_option(path: Path) -> Sequence[str]:
    return ("-qmp", f"unix:{path},server=on,wait=off")


@needs_kvm
@pytest.mark.parametrize("count", [10, 300, 700])
def test_vm_is_found_behind_inherited_descriptors(start: Start, tmp_path: Path, count: int) -> None:
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
