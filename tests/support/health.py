# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the health of a guest that runs a whole distribution."""

from __future__ import annotations

import re
from collections.abc import Callable

# Every WARN() prints a "cut here" line. "WARNING:" alone is also printed for CPU vulnerabilities.
TROUBLE = re.compile(
    r"cut here|BUG:|Oops:|Call Trace:|general protection fault|Bad page|Out of memory|"
    r"EXT4-fs error|I/O error|blocked for more than|Machine Check"
)


class UnhealthyGuestError(AssertionError):
    """A unit of the guest has failed, or its kernel has logged an error."""


def check_log(log: str) -> None:
    """Check that the kernel's log has no errors.

    :raises UnhealthyGuestError: The log has errors. The message has their lines, the exception has
        the whole log.
    """
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if TROUBLE.search(line):
            excerpt = " / ".join(lines[number : number + 4])
            raise UnhealthyGuestError(f"in the guest: the kernel complains: {excerpt}", log)


def check_health(shell: Callable[[str], str], dmesg: str = "dmesg") -> None:
    """Check that the system is up, no unit has failed, and the kernel's log has no errors.

    :param shell: Run a command in the guest and return its output, whatever its exit status. It
        must wait long enough for a boot to finish.
    :param dmesg: The command that prints the log.
    :raises UnhealthyGuestError: One of these checks failed.
    """
    state = shell("systemctl is-system-running --wait").strip()
    failed = shell("systemctl --failed --no-legend --plain").strip()
    if state.split("\n")[-1].strip() != "running" or failed:
        raise UnhealthyGuestError(f"in the guest: systemd is {state!r}", failed)
    check_log(shell(dmesg))
