# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's exception classes, which are subclasses of qemu-prefault's::

    QemuPrefaultError
    └── FailedError
        └── LabError                  a lab-* code
            ├── LabLostError             L1 ended or hangs
            ├── ImageError               an image could not be built
            ├── RemoteCommandError       a command on a machine failed
            │   └── RemoteTimeoutError   a command was killed at its time limit
            ├── GuestError               an L2 guest or its QEMU failed
            ├── QmpError                 the lab's own QMP client failed
            └── LibvirtdError            a libvirtd of the lab or its domain failed

Only the lab uses these codes, so qemu-prefault's list of error codes does not include them.
``qemu-prefault demo`` reports them like any other failure, with exit status 1. ``python -m
qemu_prefault_lab`` exits with :data:`LAB_FAILED`. Neither qemu-prefault nor pytest uses this
status, so it cannot be mistaken for the status of a command that ``run`` or ``pytest`` runs.
"""

from __future__ import annotations

from qemu_prefault.errors import FailedError

#: Exit status if the lab itself failed. ``docker run`` and ``timeout`` use the same value.
LAB_FAILED = 125


class LabError(FailedError):
    """The base class of the lab's errors."""

    code = "lab"


class LabLostError(LabError):
    """L1 has ended, or it hangs.

    QEMU ended, the kernel panicked, or the command server stopped responding. Commands that were
    running in L1 have no result. ``console`` holds the last console lines.

    :param qemu_status: QEMU's exit status if its end was detected first, else None.
    """

    code = "lab-lost"

    def __init__(self, cause: str, console: str = "", *, qemu_status: int | None = None) -> None:
        tail = console.rstrip().splitlines()[-40:]
        shown = "\n".join(f"    {line}" for line in tail) or "    (empty)"
        super().__init__(cause, f"the last lines of its console:\n{shown}")
        self.console = console
        self.qemu_status = qemu_status


class ImageError(LabError):
    """A part of the lab (a root file system, kernel or C program) could not be built."""

    code = "lab-image"


class RemoteCommandError(LabError):
    """A command on the machine failed. ``stdout`` and ``stderr`` hold its output."""

    code = "lab-command"

    def __init__(self, cause: str, stdout: bytes, stderr: bytes) -> None:
        tail = (stderr or stdout).decode(errors="replace").rstrip().splitlines()[-20:]
        super().__init__(cause, "\n".join(f"    {line}" for line in tail))
        self.stdout = stdout
        self.stderr = stderr


class RemoteTimeoutError(RemoteCommandError):
    """A command was killed because it was still running at its time limit."""

    code = "lab-command-timeout"


class GuestError(LabError):
    """QEMU ended, or its guest returned an error or did not answer."""

    code = "lab-guest"


class QmpError(LabError):
    """QEMU returned an error, or the QMP connection failed."""

    code = "lab-qmp"


class LibvirtdError(LabError):
    """libvirtd, virsh or a domain failed."""

    code = "lab-libvirtd"
