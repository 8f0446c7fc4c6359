# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the control socket of the plugin in a QEMU, and connect to it.

Every user can create sockets, and can choose their names. Therefore the name of a socket only
determines where this module connects. It uses a connection only if the kernel reports that the QEMU
process listens on the socket (SO_PEERCRED and SO_PEERPIDFD, unix(7)). Before this check, it sends
nothing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import time
from pathlib import Path
from typing import Final

from ..errors import Code, FailedError, QemuPrefaultError, UnsupportedError
from ..host.bounded import read_bounded
from ..host.foreign_fds import DataSocket
from ..host.inside_root import open_inside, reopened
from ..host.peer import Peer
from ..host.proc_files import PROC
from ..host.procfs import Process, thread_names

#: Prefix of the name of the plugin's control thread. The listening descriptor's number follows.
CONTROL_THREAD: Final = "prefault/"
#: Seconds for which :func:`find_control_socket` tries the paths in /proc/PID/net/unix.
SEARCH_SECONDS: Final = 1.0
#: Maximum size of /proc/PID/net/unix in bytes. A socket has a line of at most 165 bytes.
MAX_TABLE: Final = 16 << 20
#: Maximum number of descriptors to examine. The plugin has one control thread.
_MOST_DESCRIPTORS: Final = 8

#: A request and a reply of the sock_diag(7) subsystem: nlmsghdr with unix_diag_req, and nlmsghdr
#: with unix_diag_msg, which attributes follow.
_REQUEST: Final = struct.Struct("=IHHII BBHIIIII")
_HEADER: Final = struct.Struct("=IHHII")
_MESSAGE: Final = struct.Struct("=BBBxIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_UDIAG_SHOW_NAME, _UNIX_DIAG_NAME, _ANY = 1, 0, 0xFFFFFFFF

#: One line of /proc/net/unix (unix_seq_show(), net/unix/af_unix.c). The kernel does not escape line
#: feeds in a path. A line can therefore be a part of another socket's path.
_ROW: Final = re.compile(
    rb"^[0-9a-f]{8,16}: [0-9A-F]{8} [0-9A-F]{8} [0-9A-F]{8} [0-9A-F]{4} [0-9A-F]{2} +"
    rb"([0-9]{1,20}) (/[^\n]*)$",
    re.MULTILINE,
)


def find_control_socket(process: Process) -> Path | None:
    """Return the path of the plugin's control socket, or None if QEMU has no plugin.

    The name of the plugin's control thread contains the number of the listening socket's
    descriptor. The result is a path in QEMU's root directory. Its socket belongs to QEMU only if
    :func:`connect` succeeds.
    """
    for number in _listening_descriptors(process):
        link = process.link(f"fd/{number}") or ""
        if not link.startswith("socket:[") or not link[8:-1].isdecimal():
            continue
        path = _bound_path(process, int(link[8:-1]))
        if path is not None:
            return Path(os.fsdecode(path))
    return None


def _listening_descriptors(process: Process) -> list[str]:
    names = {
        name.removeprefix(CONTROL_THREAD)
        for name in thread_names(process).values()
        if name.startswith(CONTROL_THREAD)
    }
    return sorted(name for name in names if name.isascii() and name.isdecimal())[:_MOST_DESCRIPTORS]


def _bound_path(process: Process, inode: int) -> bytes | None:
    """Return the path to which QEMU's socket with this inode is bound, or None."""
    if _in_our_network(process):
        try:
            return diagnose_path(inode)
        except OSError:
            pass  # this kernel has no CONFIG_UNIX_DIAG
    try:
        paths = bound_paths(read_bounded(f"{process.proc}/net/unix", MAX_TABLE), inode)
    except OSError:
        return None
    if len(paths) <= 1:
        return paths[0] if paths else None
    return _first_of_qemu(process, paths)


def _in_our_network(process: Process) -> bool:
    try:
        return os.path.samefile(f"{PROC}/self/ns/net", f"{process.proc}/ns/net")
    except OSError:
        return False


def diagnose_path(inode: int) -> bytes | None:
    """Return the path to which a UNIX socket in this network namespace is bound.

    The kernel reports the path as bytes with a length, so other sockets' names have no effect.

    :param inode: The inode of the socket.
    :returns: None if the socket is unbound, or if its name is abstract.
    :raises OSError: If the kernel does not answer this request, or if the socket does not exist.
    """
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as netlink:
        netlink.settimeout(SEARCH_SECONDS)
        netlink.sendto(
            _REQUEST.pack(
                *(_REQUEST.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0),
                *(socket.AF_UNIX, 0, 0, _ANY, inode, _UDIAG_SHOW_NAME, _ANY, _ANY),
            ),
            (0, 0),
        )
        reply, sender = netlink.recvfrom(1 << 14)
    if sender[0] != 0 or len(reply) < _HEADER.size + 4:  # only the kernel has port 0
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    if _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    at = _HEADER.size + _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(reply):
        length, kind = _ATTRIBUTE.unpack_from(reply, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _UNIX_DIAG_NAME:
            name = reply[at + _ATTRIBUTE.size : at + length].rstrip(b"\0")
            return name if name.startswith(b"/") else None
        at += (length + 3) & ~3
    return None


def bound_paths(table: bytes, inode: int) -> list[bytes]:
    """Return every path in a table to which a socket with this inode may be bound.

    :param table: The content of ``/proc/PID/net/unix``. Other users can add lines to it.
    """
    found = {row[2]: None for row in _ROW.finditer(table) if int(row[1]) == inode}
    return list(found)


def _first_of_qemu(process: Process, paths: list[bytes]) -> bytes | None:
    """Return the first of the paths on whose socket QEMU listens."""
    deadline = time.monotonic() + SEARCH_SECONDS
    for path in paths:
        try:
            client = _connect(process, path)
        except (OSError, QemuPrefaultError):
            client = None
        if client is not None:
            client.discard()
            return path
        if time.monotonic() > deadline:
            break
    return None


def connect(path: str | os.PathLike[str], process: Process) -> socket.socket | None:
    """Connect to the control socket of the plugin in a process.

    :param path: The path of the socket in the process's root directory.
    :returns: A non-blocking socket, on whose other end the process listens. None if the socket's
        backlog is full.
    :raises UnsupportedError: If this process has no permission to connect.
    :raises FailedError: If the connection fails, or if another process listens on the socket.
    :raises GoneError: If the process has exited.
    """
    shown = os.fspath(path)
    try:
        return _connect(process, os.fsencode(path))
    except PermissionError as error:
        raise UnsupportedError(
            f"cannot connect to the plugin's control socket {shown}: {error.strerror}",
            "run qemu-prefault as root, or as QEMU's user",
            code=Code.CONTROL_SOCKET,
        ) from error
    except OSError as error:
        raise FailedError(
            f"cannot connect to the plugin's control socket {shown}: {error.strerror}",
            "check in QEMU's log whether QEMU has exited, or use --agent attach, which needs "
            "no plugin",
            code=Code.CONTROL_SOCKET,
        ) from error


def _connect(process: Process, path: bytes) -> DataSocket | None:
    with open_inside(process, path) as found:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        client = DataSocket()
        try:
            client.setblocking(False)
            client.connect(reopened(found))
            check_peer(client, process, os.fsdecode(path))
        except BlockingIOError:
            client.close()
            return None
        except BaseException:
            client.discard()
            raise
        return client


def check_peer(client: socket.socket, process: Process, path: str) -> None:
    """Check that a process listens on the socket to which this process is connected.

    The kernel stores the credentials of the process that called listen(2).

    :raises FailedError: If another process has called listen(2).
    :raises GoneError: If the process has exited.
    """
    peer = Peer.of(client)
    if peer is None or peer.pid != process.pid or peer.has_exited(process):
        who = "another process" if peer is None else f"process {peer.pid} (uid {peer.uid})"
        raise _foreign(process.pid, path, who)
    # If QEMU starts as root and then changes its user, the socket's uid is 0.
    status = process.status()
    if peer.uid != 0 and (peer.uid not in status.uids or peer.gid not in status.gids):
        raise _foreign(process.pid, path, f"a process with uid {peer.uid} and gid {peer.gid}")
    process.check()


def _foreign(pid: int, path: str, peer: str) -> FailedError:
    return FailedError(
        f"{path} is not the control socket of QEMU (pid {pid}): {peer} listens on it",
        "find out who created this socket, or use --agent attach, which needs no plugin",
        code=Code.CONTROL_SOCKET,
    )
