# SPDX-License-Identifier: GPL-2.0-or-later
"""The nested lab: the real ``KVM_PRE_FAULT_MEMORY`` on a machine without virtualization.

Three machines are stacked, and the names used everywhere are the nesting levels:

L0
    The machine this package is imported on. It needs no KVM. It runs QEMU's TCG,
    which emulates an AMD CPU with SVM and nested paging.
L1
    Debian from the archive, booted by :class:`Lab`. Its kvm-amd is the unmodified kernel
    module, so the ioctl, the stage-2 tables and their counters are the real thing; only
    absolute times mean nothing.
L2
    Guests of the QEMU in L1 (:mod:`qemu_prefault_lab.guest`), the ones to be prefaulted.

Where the host itself has a KVM with the capability, :func:`open_machine` hands out a
:class:`LocalMachine` with the same methods instead, and nothing is emulated.
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
    # In L1 only the guests are wanted, and every import costs ten times what it costs here.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
