# SPDX-License-Identifier: GPL-2.0-or-later
"""Protect this process from file descriptors of processes that it does not trust.

close(2) of a file's last descriptor can block. For example, it waits for as long as SO_LINGER
specifies if the file is a TCP socket with unsent data (inet_release(), net/ipv4/af_inet.c). A
process on the other end of a UNIX socket can send such a descriptor (SCM_RIGHTS, unix(7)) and close
its own. If the receiver discards the message, or closes the UNIX socket while the message is
unread, the kernel closes the descriptor before the receiver's system call returns. A time limit of
asyncio cannot end this wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

#: include/uapi/asm-generic/socket.h since Linux 6.16. Python's socket module lacks it.
SO_PASSRIGHTS: Final = 83
#: Seconds to wait until the files of a closed descriptor are released.
RELEASE_SECONDS: Final = 0.5


class DescriptorsError(OSError):
    """The peer of a :class:`DataSocket` has sent file descriptors."""

    def __init__(self) -> None:
        super().__init__("file descriptors")


class DataSocket(socket.socket):
    """A UNIX stream socket of a client that receives data, but no file descriptors.

    The kernel refuses the descriptors (SO_PASSRIGHTS), or :meth:`recv` raises an error before it
    reads them. Read from the socket only with :meth:`recv`.
    """

    def __init__(self, *, fileno: int | None = None) -> None:
        """Create a socket.

        :param fileno: The descriptor of an existing connection, of any family, or None.
        """
        if fileno is not None:
            super().__init__(fileno=fileno)
            self._unprotected = not self._refuses_descriptors()
            return
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        # The peer can send as soon as connect() has returned, so set the options before.
        with contextlib.suppress(OSError):  # ENOPROTOOPT: the kernel is older
            self.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        # recv() drops urgent data that it has not read, together with its descriptors
        # (manage_oob(), net/unix/af_unix.c). With this option, urgent data is normal data.
        self.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._unprotected = False  # no message can be queued yet

    def _refuses_descriptors(self) -> bool:
        try:
            return self.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 0
        except OSError:
            return False

    def connect(self, address: tuple[Any, ...] | str | ReadableBuffer, /) -> None:
        """Connect like :meth:`socket.socket.connect`."""
        super().connect(address)
        self._unprotected = not self._refuses_descriptors()

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive data like :meth:`socket.socket.recv`.

        :raises DescriptorsError: If descriptors belong to the data, or to the data after it. The
            data stays in the queue, so the kernel does not close the descriptors.
        """
        if not self._unprotected:
            return super().recv(bufsize, flags)
        # Without a buffer for them, the kernel reports descriptors as MSG_CTRUNC, and the queue
        # keeps them open (unix_peek_fds(), net/unix/af_unix.c). This needs no free descriptors.
        data, _, found, _ = self.recvmsg(bufsize, 0, flags | socket.MSG_PEEK)
        if found & socket.MSG_CTRUNC:
            raise DescriptorsError
        if flags & socket.MSG_PEEK or not data:
            return data
        return super().recv(len(data), flags)

    def close(self) -> None:
        """Close the socket like :meth:`socket.socket.close`, but do not wait for long."""
        if not self._unprotected:
            super().close()
        elif (fd := self.detach()) >= 0:
            close_foreign(fd)

    def discard(self) -> None:
        """Shut the connection down, and close the socket.

        Unlike :meth:`close`, this method needs no child process if the peer has sent nothing. Use
        it only if no other process has a copy of the socket.
        """
        with contextlib.suppress(OSError):  # also DescriptorsError
            self.settimeout(0)
            self.shutdown(socket.SHUT_RDWR)  # the peer can send no further message
            if not self.recv(1, socket.MSG_PEEK):
                self._unprotected = False
        self.close()


def close_foreign(fd: int) -> None:
    """Close a descriptor for which close(2) could block.

    The kernel does not linger when a process exits (PF_EXITING). Therefore a child process keeps a
    copy of the descriptor while this process closes its own, and then exits. A thread would wait
    until the peer permits its end, so a hostile peer could accumulate threads in the daemon.
    """
    try:
        child, release = _fork_holder()
    except OSError:  # a limit on processes or memory
        os.close(fd)
        return
    try:
        os.close(fd)
    finally:
        os.close(release)
        _reap(child)


def _fork_holder() -> tuple[int, int]:
    """Fork a child process that exits when the returned descriptor is closed.

    :returns: The child's pid, and the descriptor.
    """
    held, release = os.pipe2(os.O_CLOEXEC)
    # Signal handlers would write to this process's wakeup descriptor (signal.set_wakeup_fd()).
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.fork()
        if child == 0:
            try:
                os.close(release)
                os.read(held, 1)
            finally:
                os._exit(0)
    except OSError:
        os.close(release)
        raise
    finally:
        os.close(held)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return child, release


def _reap(child: int) -> None:
    """Wait for the end of a child process, for at most :data:`RELEASE_SECONDS`."""
    with contextlib.suppress(OSError):  # the embedding program has reaped the child
        pidfd = os.pidfd_open(child)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(RELEASE_SECONDS * 1000):
                os.waitpid(child, 0)
                return
        finally:
            os.close(pidfd)
        threading.Thread(target=os.waitpid, args=(child, 0), daemon=True).start()
