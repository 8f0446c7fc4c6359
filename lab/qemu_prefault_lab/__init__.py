# SPDX-License-Identifier: GPL-2.0-or-later
"""The nested lab, which runs the real ioctl without hardware virtualization.

The lab nests three machines. The project names them by their nesting level:

L0
    The machine that imports this package. It needs no KVM, because it runs QEMU's TCG,
    which emulates an AMD CPU with SVM and nested paging.
L1
    A Debian system, booted by :class:`Lab`. Its kvm-amd is the unmodified kernel module, so
    the ioctl, the stage-2 tables and their counters are real. Absolute times are not
    comparable to those of real hardware.
L2
    The guests of the QEMU in L1 (:mod:`qemu_prefault_lab.guest`). The tests prefault these guests.

If the host's own KVM supports the ioctl, :func:`open_machine` returns a :class:`LocalMachine`
instead. That class has the same methods as :class:`Lab`, but uses no emulation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import LabLostError, RemoteCommandError, RemoteTimeoutError

if TYPE_CHECKING:
    from .bochs import BochsLab
    from .launch import open_machine
    from .machine import Completed, LocalMachine, Machine
    from .nested import Lab

__all__ = [
    "BochsLab",
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
    "BochsLab": "bochs",
    "Completed": "machine",
    "Lab": "nested",
    "LocalMachine": "machine",
    "Machine": "machine",
    "open_machine": "launch",
}


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def __getattr__(name: str) -> Any:
    # Import a module when it is first used. L1 needs only the guest modules, and an import takes
    # ten times as long there as on L0.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
