# SPDX-License-Identifier: GPL-2.0-or-later
"""Start QEMU with the plugin on this machine, and read the plugin's status."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from qemu_prefault.host import kvm
from qemu_prefault_lab.wait import wait_for

from . import capable_kvm
from .qemu import Qemu
from .qmp import QmpClient


def capable_prefix() -> list[str]:
    """Return the arguments to prepend to QEMU's command so that KVM offers the ioctl.

    If this host's KVM has the ioctl, the list is empty.
    """
    return [] if kvm.pre_fault_capability().available else capable_kvm.prefix()


def ask_status(path: Path) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b"status\n")
        with client.makefile() as answers:
            answer: dict[str, Any] = json.loads(answers.readline())
    return answer


def wait_started(qemu: Qemu, control: Path) -> dict[str, Any]:
    """Wait until the guest runs prefaulted, and return the plugin's status."""
    QmpClient(qemu.qmp).close()  # QMP responds when the machine is complete
    status: dict[str, Any] = {}

    def has_started() -> bool:
        assert qemu.process.poll() is None, "QEMU exited"
        status.update(ask_status(control))
        return bool(status["vcpus"][0]["running"] and status["counters"]["prefaulted"])

    wait_for(has_started, "the guest has started")
    return status
