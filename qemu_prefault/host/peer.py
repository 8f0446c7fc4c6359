# SPDX-License-Identifier: GPL-2.0-or-later
"""Identify the process that opened a UNIX socket to which this process is connected."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
import weakref
from dataclasses import dataclass
from typing import Final

from ..errors import GoneError
from .pin import has_exited
from .procfs import Process

#: include/uapi/asm-generic/socket.h since Linux 6.5. Python's socket module lacks it.
SO_PEERPIDFD: Final = 77
#: struct ucred (unix(7)).
_UCRED: Final = struct.Struct("=iII")


@dataclass(frozen=True, eq=False)
class Peer:
    """The process that called listen() on a socket.

    The kernel stores this process when it calls listen(). The process may have exited since then,
    and another process may have its pid.

    :ivar pid: The pid of the process (SO_PEERCRED).
    :ivar uid: The effective user id of the process when it called listen().
    :ivar gid: The effective group id of the process when it called listen().
    :ivar pidfd: A descriptor of the process (SO_PEERPIDFD). It is None before Linux 6.5. This
        object closes the descriptor when it is no longer used.
    :ivar exited: Whether the kernel reports that the process has exited.
    :ivar connected_at: The time of CLOCK_BOOTTIME in seconds at which this object was created.
    """

    pid: int
    uid: int
    gid: int
    pidfd: int | None
    exited: bool
    connected_at: float

    @classmethod
    def of(cls, sock: socket.socket) -> Peer | None:
        """Return the process that called listen() on a connected socket.

        The result is None if the socket is not a UNIX socket, or if the process is not visible in
        this pid namespace.
        """
        if sock.family != socket.AF_UNIX:
            return None
        pid, uid, gid = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if not pid:
            return None
        pidfd, exited = None, False
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:  # ENOPROTOOPT: the kernel is older
            exited = error.errno == errno.ESRCH
        peer = cls(pid, uid, gid, pidfd, exited, time.clock_gettime(time.CLOCK_BOOTTIME))
        if pidfd is not None:
            weakref.finalize(peer, os.close, pidfd)
        return peer

    def has_exited(self, process: Process) -> bool:
        """Return whether the peer has exited, so that another process may have its pid.

        Without SO_PEERPIDFD, this method detects only a process that has started after this process
        has connected to the socket. It does not detect a process that got the pid earlier.

        :param process: The result of :meth:`.Process.find` for the peer's pid.
        """
        if self.pidfd is not None:
            # If the peer is alive, no other process can have had its pid.
            return has_exited(self.pidfd)
        ticks = os.sysconf("SC_CLK_TCK")
        return self.exited or process.start_time > self.connected_at * ticks + 1

    def check(self, process: Process) -> None:
        """Check with :meth:`has_exited` that a process with the peer's pid is the peer.

        :raises GoneError: If the peer has exited.
        """
        if self.has_exited(process):
            raise GoneError(
                f"the process that opened the QMP socket (pid {self.pid}) has exited, and another "
                "process may have its pid",
                "specify QEMU's pid with --pid, if QEMU inherited the socket from that process",
            )
