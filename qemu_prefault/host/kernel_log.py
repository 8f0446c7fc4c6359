# SPDX-License-Identifier: GPL-2.0-or-later
"""Search the kernel log for the reason why a process was killed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

from ..errors import Code, FailedError
from .proc_files import parse_number
from .procfs import Process

KMSG: Final = "/dev/kmsg"
MAX_RECORDS: Final = 100_000
MAX_TEXT: Final = 2048  # PRINTK_MESSAGE_MAX, kernel/printk/internal.h


def read_log() -> list[str]:
    """Return the records of the kernel log, the oldest first.

    The result is empty if this process cannot read the log.
    """
    records: list[str] = []
    try:
        fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return records
    try:
        while len(records) < MAX_RECORDS:
            try:
                records.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:  # the record was overwritten
                continue
            except OSError:
                break
    finally:
        os.close(fd)
    return records


def cause_of_death(process: Process) -> str | None:
    """Return the kernel's message that a process was killed.

    The result is None if the kernel log contains no such message.
    """
    since = process.start_time / os.sysconf("SC_CLK_TCK")
    return find_cause(read_log(), process.pid, since)


def exit_error(process: Process, message: str) -> FailedError:
    """Return the error for a QEMU process that has exited.

    If the kernel log contains the reason for the exit, the message ends with the reason.

    :param message: The message without the reason.
    """
    cause = cause_of_death(process)
    return FailedError(
        message + (f": {cause}" if cause else ""),
        "see the kernel log (dmesg) for details"
        if cause
        else "see QEMU's log and the kernel log (dmesg) for the reason",
        code=Code.QEMU_GONE,
    )


def find_cause(records: Iterable[str], pid: int, since: float) -> str | None:
    """Return the last message that process ``pid`` was killed.

    The result is None if the records contain no such message.

    :param records: Records of ``/dev/kmsg`` in the form ``PRIORITY,SEQUENCE,MICROSECONDS,-;TEXT``.
    :param since: A time in seconds since boot. The function ignores older records, because they may
        refer to an earlier process with the same pid.
    """
    kinds = (
        rf"[Kk]illed process {pid} ",  # oom_kill_process(), mm/oom_kill.c
        rf"\[{pid}\]: segfault at |\[{pid}\] general protection ",
        rf"\bMCE: Killing \S*:{pid} ",  # kill_proc(), mm/memory-failure.c
    )
    pattern = re.compile("|".join(kinds))
    found = None
    for record in records:
        head, _, text = record.partition(";")
        fields = head.split(",")
        text = text.split("\n")[0][:MAX_TEXT]
        microseconds = parse_number(fields[2]) if len(fields) > 2 else None
        if microseconds is None or microseconds / 1e6 < since:
            continue
        if pattern.search(text) or _is_seccomp_kill(text, pid):
            found = text
    return found


def _is_seccomp_kill(text: str, pid: int) -> bool:
    """Return whether a message is the audit record of a kill by a seccomp filter."""
    words = text.split()
    return (
        "type=1326" in words  # AUDIT_SECCOMP, include/uapi/linux/audit.h
        and f"pid={pid}" in words
        and any(word.startswith("sig=") and word != "sig=0" for word in words)
    )
