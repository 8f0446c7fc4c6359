# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's tree of errors, a branch of the product's::

    QemuPrefaultError
    └── FailedError
        └── LabError                  a lab-* code
            ├── LabLostError             L1 is gone or wedged
            ├── ImageError               an image could not be built
            ├── RemoteCommandError       a command on a machine failed
            │   └── RemoteTimeoutError   … was killed at its time limit
            ├── GuestError               an L2 guest, or its QEMU
            ├── QmpError                 the lab's own QMP client
            └── LibvirtdError            a libvirtd of the lab, or its domains

The codes are the lab's and no part of the product's catalogue. ``qemu-prefault demo`` reports
them as any failure, with exit status 1. ``python -m qemu_prefault_lab`` exits with
:data:`LAB_FAILED`, which neither qemu-prefault nor pytest uses, because the exit status of its
``run`` and ``pytest`` is otherwise that of the command in the lab.
"""

from __future__ import annotations

from qemu_prefault.errors import FailedError

LAB_FAILED = 125
"""Exit status if the lab itself failed, as with ``docker run`` and ``timeout``."""


class LabError(FailedError):
    """Something that the lab provides does not work."""

    code = "lab"


class LabLostError(LabError):
    """L1 is gone or wedged: QEMU ended, the kernel panicked, or its command server fell silent.

    Whatever was running there has no result. ``console`` holds the last console lines.

    :param qemu_status: QEMU's exit status, if its end is what was noticed first; else None.
    """

    code = "lab-lost"

    def __init__(self, cause: str, console: str = "", *, qemu_status: int | None = None) -> None:
        tail = console.rstrip().splitlines()[-40:]
        shown = "\n".join(f"    {line}" for line in tail) or "    (empty)"
        super().__init__(cause, f"last lines of its console:\n{shown}")
        self.console = console
        self.qemu_status = qemu_status


class ImageError(LabError):
    """A part of the lab (root file system, kernel, C program) could not be built."""

    code = "lab-image"


class RemoteCommandError(LabError):
    """A command ran in the machine and failed; its output so far is kept."""

    code = "lab-command"

    def __init__(self, cause: str, stdout: bytes, stderr: bytes) -> None:
        tail = (stderr or stdout).decode(errors="replace").rstrip().splitlines()[-20:]
        super().__init__(cause, "\n".join(f"    {line}" for line in tail))
        self.stdout = stdout
        self.stderr = stderr


class RemoteTimeoutError(RemoteCommandError):
    """A command was still running at its time limit and was killed."""

    code = "lab-command-timeout"


class GuestError(LabError):
    """QEMU ended, or its guest does not answer, or answered with an error."""

    code = "lab-guest"


class QmpError(LabError):
    """QEMU refused a command, or the conversation broke."""

    code = "lab-qmp"


class LibvirtdError(LabError):
    """The daemon, virsh, or a domain does not do what it should."""

    code = "lab-libvirtd"
