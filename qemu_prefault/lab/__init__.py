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
    Guests of the QEMU in L1 (:mod:`qemu_prefault.lab.guest`), the ones to be prefaulted.

Where the host itself has a KVM with the capability, :func:`open_machine` hands out a
:class:`LocalMachine` with the same methods instead, and nothing is emulated.
"""

from __future__ import annotations

from .errors import CommandError, CommandTimeoutError, LabLostError
from .machine import Completed, LocalMachine, Machine, kvm_can_prefault
from .nested import Lab

__all__ = [
    "CommandError",
    "CommandTimeoutError",
    "Completed",
    "Lab",
    "LabLostError",
    "LocalMachine",
    "Machine",
    "kvm_can_prefault",
    "open_machine",
]


def open_machine(variant: str = "trixie", *, nested: bool = False, npt: bool = True) -> Machine:
    """Give a machine that can prefault: this host if it can, else a booted lab.

    :param nested: take the lab even so; implied by ``npt=False``.
    """
    if kvm_can_prefault() and npt and not nested:
        return LocalMachine()
    return Lab.start(variant, npt=npt)
