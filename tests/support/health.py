# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the health of a guest that runs a whole distribution."""

from __future__ import annotations

import re
from collections.abc import Callable

# Search for the "cut here" line that every WARN() prints, because "WARNING:" would also match
# messages about CPU vulnerabilities.
TROUBLE = re.compile(
    r"cut here|BUG:|Oops:|Call Trace:|general protection fault|Bad page|Out of memory|"
    r"EXT4-fs error|I/O error|blocked for more than|Machine Check"
)


class UnhealthyGuestError(AssertionError):
    """A guest's systemd unit failed, or the guest's kernel logged an error."""


def check_log(log: str) -> None:
    """Check that the kernel's log contains no errors.

    :raises UnhealthyGuestError: If the log contains errors. The message quotes the first error, and
        the exception holds the whole log.
    """
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if TROUBLE.search(line):
            excerpt = " / ".join(lines[number : number + 4])
            raise UnhealthyGuestError(f"the guest's kernel log contains an error: {excerpt}", log)


def check_health(shell: Callable[[str], str], dmesg: str = "dmesg") -> None:
    """Check that the guest's system is up, without failed units or kernel errors.

    :param shell: A function that runs a command in the guest and returns the command's output,
        regardless of the exit status. The time limit must be long enough for a boot to finish.
    :param dmesg: The command that prints the kernel's log.
    :raises UnhealthyGuestError: If one of these checks fails.
    """
    state = shell("systemctl is-system-running --wait").strip()
    failed = shell("systemctl --failed --no-legend --plain").strip()
    if state.split("\n")[-1].strip() != "running" or failed:
        raise UnhealthyGuestError(f"the state of the guest's systemd is {state!r}", failed)
    check_log(shell(dmesg))
