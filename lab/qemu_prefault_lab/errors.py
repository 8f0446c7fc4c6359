# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's exception classes, which are subclasses of qemu-prefault's::

    QemuPrefaultError
    └── FailedError
        └── LabError                  a lab-* code
            ├── LabLostError             L1 exited or hangs
            ├── ImageError               an image could not be built
            ├── RemoteCommandError       a command on a machine failed
            │   └── RemoteTimeoutError   a command was killed at its time limit
            ├── GuestError               an L2 guest or its QEMU failed
            ├── QmpError                 the lab's own QMP client failed
            └── LibvirtdError            the lab's libvirtd or a domain failed

Only the lab uses the ``lab-*`` codes, so qemu-prefault's list of error codes does not include them.
``qemu-prefault demo`` reports these errors like any other failure, with exit status 1. ``python -m
qemu_prefault_lab`` exits with :data:`LAB_FAILED`. Neither qemu-prefault nor pytest uses this
status, so it cannot be mistaken for the status of either.
"""

from __future__ import annotations

from qemu_prefault.errors import FailedError

#: Exit status if the lab itself failed. ``docker run`` and ``timeout`` use the same value.
LAB_FAILED = 125


class LabError(FailedError):
    """The base class of the lab's errors."""

    code = "lab"


class LabLostError(LabError):
    """An error because L1 has exited or hangs.

    The cause is that the emulator exited, that the kernel panicked, or that the command server
    stopped responding. Commands that were running in L1 have no result. ``console`` holds the last
    console lines.

    :param emulator_status: The emulator's exit status if the first sign of the loss was that it
        exited. Otherwise None.
    """

    code = "lab-lost"

    def __init__(
        self, cause: str, console: str = "", *, emulator_status: int | None = None
    ) -> None:
        tail = console.rstrip().splitlines()[-40:]
        shown = "\n".join(f"    {line}" for line in tail) or "    (empty)"
        super().__init__(cause, f"these are the last lines of L1's console:\n{shown}")
        self.console = console
        self.emulator_status = emulator_status


class ImageError(LabError):
    """An error in the build of a root file system, a kernel or a C program."""

    code = "lab-image"


class RemoteCommandError(LabError):
    """A failure of a command on a machine, with the command's output.

    ``stdout`` and ``stderr`` hold the output.
    """

    code = "lab-command"

    def __init__(self, cause: str, stdout: bytes, stderr: bytes) -> None:
        tail = (stderr or stdout).decode(errors="replace").rstrip().splitlines()[-20:]
        super().__init__(cause, "\n".join(f"    {line}" for line in tail))
        self.stdout = stdout
        self.stderr = stderr


class RemoteTimeoutError(RemoteCommandError):
    """An error because a command exceeded its time limit and was killed."""

    code = "lab-command-timeout"


class GuestError(LabError):
    """An error because QEMU exited, or the guest failed or did not reply."""

    code = "lab-guest"


class QmpError(LabError):
    """An error that QEMU returned, or a failure of the QMP connection."""

    code = "lab-qmp"


class LibvirtdError(LabError):
    """A failure of libvirtd, virsh or a domain."""

    code = "lab-libvirtd"
