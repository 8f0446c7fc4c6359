# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep a reference to one process, which stays valid if the kernel reuses the process's pid.

A pid is only a number. After the process has exited, the kernel gives the number to another
process, which may belong to another user. Therefore all reads of a pinned process go through a
descriptor of its ``/proc/PID`` directory. After the process has exited, these reads fail, even if
another process has the same pid (get_proc_task(), fs/proc/base.c).

The descriptor stays valid if the process executes another program, or changes its user.
:class:`Traits` detects these changes.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from dataclasses import dataclass
from typing import Final

from .proc_files import stat_fields

#: This directory stays /proc even in a test that simulates the /proc of a host.
_OWN_FDS: Final = "/proc/self/fd"
#: The fields of /proc/PID/stat that contain addresses of the program, numbered as in proc(5):
#: startcode, endcode, startstack, start_data, end_data and start_brk.
_PROGRAM_FIELDS: Final = (26, 27, 28, 45, 46, 47)


class Pin:
    """Descriptors of one process, which this object closes when it is no longer used.

    :ivar directory: A descriptor of the directory ``/proc/PID``.
    :ivar pidfd: A descriptor of the process (pidfd_open(2)), or -1 if the kernel returns none. The
        kernel needs Linux 5.3, and returns none for the id of a thread.
    """

    def __init__(self, path: str, pid: int) -> None:
        """Open the descriptors.

        The caller must then check through :attr:`directory` that the process is alive. If it is,
        its pid was not reused before the pidfd was opened, so both descriptors are of this process.

        :param path: The path of the process's directory in /proc.
        :raises OSError: If the directory cannot be opened.
        """
        self.directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.pidfd = -1
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(pid)
        weakref.finalize(self, _close, self.directory, self.pidfd)

    @property
    def path(self) -> str:
        """A path of the process's directory, which is valid while this object exists."""
        return f"{_OWN_FDS}/{self.directory}"


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def has_exited(pidfd: int, seconds: float = 0.0) -> bool:
    """Return whether a process has exited, or exits within ``seconds``.

    :param pidfd: A descriptor of the process (pidfd_open(2)).
    """
    poll = select.poll()  # select() fails for a descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(round(seconds * 1000)))


@dataclass(frozen=True, slots=True)
class Traits:
    """The traits of a process that change if it executes a program or changes its user.

    :ivar uids: The real, effective, saved and file system user ids.
    :ivar gids: The real, effective, saved and file system group ids.
    :ivar program: The addresses of the program's code, data, heap and stack, which the kernel
        chooses at random for each execve(2). The addresses are 0 if this process has no permission
        to trace the process. A change of this permission therefore also changes this value.
    """

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    program: tuple[int, ...]


def program_addresses(stat: str) -> tuple[int, ...]:
    """Return the addresses in the text of ``/proc/PID/stat``, see :attr:`Traits.program`.

    The result is empty if the text has another format.
    """
    fields = stat_fields(stat)
    try:
        return tuple(int(fields[number - 3]) for number in _PROGRAM_FIELDS)
    except (IndexError, ValueError):
        return ()
