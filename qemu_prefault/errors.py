# SPDX-License-Identifier: GPL-2.0-or-later
"""One tree of errors: every error says what failed, on what, and what to do now.

The leaves are grouped by what the operator can conclude, which is also the exit
status of the command line::

    QemuPrefaultError
    ├── FailedError          1  it should have worked and did not
    │   ├── MonitorError        the QMP conversation
    │   └── AgentError          the helper inside QEMU
    ├── InputError           2  the command line, or a file it names
    ├── PartialError         3  some requested bytes are not accounted for
    ├── UnsupportedError     4  this host, kernel or QEMU cannot
    └── RefusedError         5  it could, but that would hurt the guest
"""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """Exit statuses of the command line; scripts depend on them."""

    VERIFIED = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    UNSUPPORTED = 4
    REFUSED = 5


class QemuPrefaultError(Exception):
    """Base of all errors of this package.

    :param cause: what failed and on what, one sentence without a full stop.
    :param remedy: what the operator can do now; may be several lines.
    :param code: a stable, machine-readable name (kebab-case), used in JSON.
    """

    exit_status = ExitStatus.FAILED
    code = "failed"

    def __init__(self, cause: str, remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class FailedError(QemuPrefaultError):
    """It should have worked and did not."""


class MonitorError(FailedError):
    """The QMP conversation with QEMU failed."""

    code = "monitor"


class AgentError(FailedError):
    """The helper inside QEMU could not be started, or stopped answering."""

    code = "agent"


class InputError(QemuPrefaultError):
    """The command line is wrong, or names something that is not there."""

    exit_status = ExitStatus.USAGE
    code = "usage"


class PartialError(QemuPrefaultError):
    """Some of the requested bytes are not accounted for."""

    exit_status = ExitStatus.PARTIAL
    code = "partial"


class UnsupportedError(QemuPrefaultError):
    """This host, kernel or QEMU cannot do what was asked."""

    exit_status = ExitStatus.UNSUPPORTED
    code = "unsupported"


class RefusedError(QemuPrefaultError):
    """It could be done, but doing it now would hurt the guest or the host."""

    exit_status = ExitStatus.REFUSED
    code = "refused"
