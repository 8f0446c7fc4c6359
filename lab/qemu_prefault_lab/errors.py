# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong with the lab, as leaves of the package's one tree of errors."""

from __future__ import annotations

from qemu_prefault.errors import FailedError


class LabLostError(FailedError):
    """L1 is gone or wedged: QEMU ended, the kernel panicked, or the agent fell silent.

    Whatever was running there has no result. ``console`` holds the last console lines.
    """

    code = "lab-lost"

    def __init__(self, cause: str, console: str = "") -> None:
        tail = console.rstrip().splitlines()[-40:]
        shown = "\n".join(f"    {line}" for line in tail) or "    (empty)"
        super().__init__(cause, f"last lines of its console:\n{shown}")
        self.console = console


class ImageError(FailedError):
    """A part of the lab (root file system, kernel, C program) could not be built."""

    code = "lab-image"


class CommandError(FailedError):
    """A command ran in the machine and failed; its output so far is kept."""

    code = "lab-command"

    def __init__(self, cause: str, stdout: bytes, stderr: bytes) -> None:
        tail = (stderr or stdout).decode(errors="replace").rstrip().splitlines()[-20:]
        super().__init__(cause, "\n".join(f"    {line}" for line in tail))
        self.stdout = stdout
        self.stderr = stderr


class CommandTimeoutError(CommandError):
    """A command was still running at its time limit and was killed."""

    code = "lab-command-timeout"
