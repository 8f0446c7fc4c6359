# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that QEMU does not wait for the reader of stderr if the plugin prints events."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.plugin import ask_status, capable_prefix, wait_started
from support.qemu import StartQemu, kvm_usable
from support.qmp import QmpClient

pytestmark = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")
DIMM = 64 << 20


def fill_stderr(pid: int) -> None:
    pipe = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.close(pipe)


def test_full_stderr_does_not_stop_qemu(start_qemu: StartQemu, tmp_path: Path) -> None:
    control = tmp_path / "control"
    qemu = start_qemu(
        *("-m", "64M,slots=2,maxmem=1G"),
        *("-plugin", f"{plugin_path()},socket={control},log=on"),
        accel="kvm",
        paused=False,
        prefix=capable_prefix(),
    )
    wait_started(qemu, control)
    monitor = QmpClient(qemu.qmp)
    fill_stderr(qemu.pid)
    backend: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": "m", "size": DIMM}
    monitor.execute("object-add", **backend)
    monitor.execute("device_add", driver="pc-dimm", id="d", memdev="m")
    assert monitor.status() == "running"
    assert ask_status(control)["lost_messages"] == 0
    qemu.process.send_signal(signal.SIGTERM)
    _, stderr = qemu.process.communicate(timeout=60)
    assert qemu.process.returncode == 0
    assert b'"event":"slot-created"' in stderr.rpartition(b"xxxxxxxx")[2]
