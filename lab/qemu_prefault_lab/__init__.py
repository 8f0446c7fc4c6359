# SPDX-License-Identifier: GPL-2.0-or-later
"""The nested lab: the real ``KVM_PRE_FAULT_MEMORY`` on a host without virtualization.

The lab nests three machines. They are named by their nesting level throughout the project:

L0
    The machine that imports this package. It needs no KVM. It runs QEMU's TCG,
    which emulates an AMD CPU with SVM and nested paging.
L1
    A Debian system, booted by :class:`Lab`. Its kvm-amd is the unmodified kernel module, so
    the ioctl, the stage-2 tables and their counters are real. Absolute times are not
    comparable to those of real hardware.
L2
    The guests of the QEMU in L1 (:mod:`qemu_prefault_lab.guest`). The tests prefault these.

If the host's own KVM has the capability, :func:`open_machine` returns a :class:`LocalMachine`
with the same methods instead, and nothing is emulated.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import LabLostError, RemoteCommandError, RemoteTimeoutError

if TYPE_CHECKING:
    from .machine import Completed, LocalMachine, Machine
    from .nested import Lab, open_machine

__all__ = [
    "Completed",
    "Lab",
    "LabLostError",
    "LocalMachine",
    "Machine",
    "RemoteCommandError",
    "RemoteTimeoutError",
    "open_machine",
]

_HOMES = {
    "Completed": "machine",
    "Lab": "nested",
    "LocalMachine": "machine",
    "Machine": "machine",
    "open_machine": "nested",
}


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def __getattr__(name: str) -> Any:
    # L1 imports only the guest modules. An import there takes ten times as long as on L0.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
