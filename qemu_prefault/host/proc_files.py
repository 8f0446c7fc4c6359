# SPDX-License-Identifier: GPL-2.0-or-later
"""Read files in ``/proc`` and ``/sys`` with limits, and describe why one cannot be read.

Other users control the contents of many of these files. Every read has a limit
(:mod:`qemu_prefault.host.bounded`), and text that is not UTF-8 is decoded with surrogateescape.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Final

from ..errors import (
    REMEDY_OPEN_FILES,
    Code,
    FailedError,
    GoneError,
    QemuPrefaultError,
    UnsupportedError,
)
from .bounded import limit_of, read_bounded

PROC: Final = "/proc"


def gone(pid: int) -> GoneError:
    """Return the error for a process that has exited."""
    return GoneError(
        f"process {pid} has exited", "see QEMU's log for the reason if the process is QEMU"
    )


def changed(pid: int) -> GoneError:
    """Return the error for a process that is no longer the one that was identified."""
    return GoneError(
        f"process {pid} has executed another program or changed its user since qemu-prefault "
        "identified it as QEMU",
        "check which program process "
        f"{pid} runs now (ps -p {pid}), and run qemu-prefault again if it is QEMU",
    )


def beyond_limit(cause: str) -> FailedError:
    """Return the error for a file in /proc that is larger than an ordinary QEMU needs."""
    return FailedError(
        cause,
        "check whether the process is a QEMU that works correctly, because an ordinary QEMU does "
        "not reach this limit",
        code=Code.PROC,
    )


def is_hidden(pid: int) -> bool:
    """Return whether /proc hides a process or thread that exists."""
    if os.path.isdir(f"{PROC}/{pid}"):
        return False  # /proc shows the process, which is exiting
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def hidden(pid: int) -> UnsupportedError:
    """Return the error for a process that /proc does not show."""
    return UnsupportedError(
        f"process {pid} exists, but /proc does not show it",
        "run qemu-prefault as root on the host, and check whether the hidepid= option of /proc or "
        "the ProtectProc= setting of the service hides the process",
        code=Code.PROC_PERMISSION,
    )


def denied(path: str) -> UnsupportedError:
    """Return the error for a /proc file that this process is not allowed to read."""
    return UnsupportedError(
        f"this process has no permission to read {path}",
        "run qemu-prefault as root, or as QEMU's user with CAP_SYS_PTRACE",
        code=Code.PROC_PERMISSION,
    )


def read_file(path: str, pid: int, shown: str | None = None) -> str:
    """Return the text of a /proc/PID file.

    :param shown: The name of the file in messages, if ``path`` uses a descriptor of the pinned
        process.
    :raises GoneError: If the process has exited.
    :raises UnsupportedError: If this process has no permission to read the file, or if /proc does
        not show the process.
    :raises FailedError: If this process cannot read the file for another reason. One reason is that
        the file is larger than its limit (code ``proc``).
    """
    return read_file_bytes(path, pid, shown).decode("utf-8", "surrogateescape")


def read_file_bytes(path: str, pid: int, shown: str | None = None) -> bytes:
    """Return the content of a /proc/PID file.

    The parameters and errors are those of :func:`read_file`.
    """
    try:
        return read_bounded(path, limit_of(path))
    except OSError as error:
        raise read_error(error, path, pid, shown) from error


def read_error(error: OSError, path: str, pid: int, shown: str | None = None) -> QemuPrefaultError:
    """Return the error for a file or a directory in /proc that could not be read.

    The parameters are those of :func:`read_file`.
    """
    name = shown or path
    if isinstance(error, (FileNotFoundError, ProcessLookupError)):
        if not f"{name}/".startswith(f"{PROC}/{pid}/"):
            return UnsupportedError(
                f"/proc does not show {name}",
                "run qemu-prefault where /proc is mounted without subset=pid. If a systemd service "
                "runs qemu-prefault, remove ProcSubset=pid from the service's unit",
                code=Code.PROC_PERMISSION,
            )
        return hidden(pid) if shown is None and is_hidden(pid) else gone(pid)
    if isinstance(error, PermissionError):
        return denied(name)
    if error.errno == errno.EFBIG:
        return beyond_limit(f"cannot read {name}: {error.strerror}")
    too_many = error.errno in (errno.EMFILE, errno.ENFILE)
    return FailedError(
        f"cannot read {name}: {error.strerror}",
        REMEDY_OPEN_FILES if too_many else "check whether /proc is mounted",
        code=Code.PROC,
    )


def read_limited(path: str) -> str:
    """Return the text of a file, whose size is limited by :func:`~.bounded.limit_of`.

    :raises OSError: If the file cannot be read or is too large.
    """
    return read_bounded(path, limit_of(path)).decode("utf-8", "surrogateescape")


def read_optional(path: str) -> str | None:
    """Return a file's text, or None if the file cannot be read or is too large."""
    try:
        return read_limited(path)
    except (OSError, ValueError):  # ValueError: a path from another file contains a null character
        return None


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a text that are not empty, without building a list of all lines."""
    return (match[0] for match in re.finditer(r"[^\n]+", text))


def stat_fields(text: str) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` that follow the command name, from field 3 on.

    :param text: The content of the file.
    """
    # The command name is in parentheses and may contain any character, even ')' and '\n'.
    return text[text.rfind(")") + 1 :].split()


def malformed(what: str, text: str) -> FailedError:
    """Return the error for a /proc file in an unknown format."""
    return FailedError(
        f"{what} has an unknown format: {text[:120]!r}",
        "report this error with the kernel's version (uname -r)",
        code=Code.PROC,
    )


def parse_number(text: str | None) -> int | None:
    """Return the number in a file's text, or None for other text such as ``max``."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def parse_number_list(text: str, most: int) -> tuple[int, ...]:
    """Return the numbers in a list in the kernel's format, such as ``0-2,5``.

    The result is empty if the text has another format. The kernel prints such a list in ascending
    order (bitmap_list_string(), lib/vsprintf.c).

    :param most: The exclusive upper bound. If a number is not below it, the result is empty.
    """
    found: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if match is None:
            return ()
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= most or (found and first <= found[-1]):
            return ()
        found += range(first, last + 1)
    return tuple(found)
