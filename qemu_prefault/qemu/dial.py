# SPDX-License-Identifier: GPL-2.0-or-later
"""Connect to a QMP server's socket, and wait for its greeting.

A QMP socket serves one client at a time. The connect() of a second client succeeds, but QEMU sends
no greeting to this client. :func:`await_greeting` distinguishes this case from a slow or silent
server, and from a peer that is not a QMP server.
"""

from __future__ import annotations

import asyncio
import enum
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, NoReturn

from qemu.qmp import ConnectError

from ..errors import Code, InputError, MonitorBusyError, MonitorError, QemuPrefaultError
from ..host.bounded import too_large
from ..host.foreign_fds import DataSocket, DescriptorsError
from .message_limits import MAX_REPLY, TooLargeError

#: A coroutine function that opens a connection on which QEMU will send its greeting. The function
#: returns the non-blocking socket, and the UUID of the VM that must be at the other end.
Dial = Callable[[], Awaitable[tuple[socket.socket, str]]]

#: Maximum size of /proc/net/unix in bytes. A larger table is not evaluated.
MAX_TABLE: Final = 64 << 20
#: Seconds that an accepted QMP client waits for the greeting. QEMU sends the greeting from its main
#: loop, within microseconds if nothing blocks that loop.
GREETING_TIMEOUT: Final = 2.0
#: Seconds without a greeting after which /proc/net/unix is checked for another client.
BUSY_GRACE: Final = 0.25


_REMEDY_ADDRESS: Final = "specify the socket of QEMU's -qmp unix:PATH,server=on,wait=off option"
_REMEDY_BUSY: Final = (
    "close the other client (libvirt, a QMP shell), or start QEMU with a second "
    "-qmp unix:PATH,server=on,wait=off for qemu-prefault"
)
REMEDY_SILENT: Final = (
    "check that the socket is a QMP monitor without websocket=on and tls-creds, and not a guest "
    "agent: these wait for the client, and qemu-prefault supports none of them. Start QEMU with a "
    "second -qmp unix:PATH,server=on,wait=off if necessary\n"
    "check whether QEMU is stopped or frozen, is blocked in its main loop, or has reached its "
    "limit on open files (prlimit --pid PID --nofile, ls /proc/PID/fd)"
)


async def connect(address: str, deadline: float) -> socket.socket:
    """Connect to a QMP socket.

    :param address: An address in a form that :func:`parse_address` accepts.
    :param deadline: The time of the event loop, in seconds, at which the attempt fails.
    :returns: A connected, non-blocking socket.
    :raises InputError: If the address is malformed, or if the socket or the host does not exist.
    :raises MonitorBusyError: If the socket's backlog stays full.
    :raises MonitorError: If the connection fails for another reason.
    """
    target = parse_address(address)
    loop = asyncio.get_running_loop()
    if isinstance(target, str):
        # Connections that clients have closed stay in the backlog until QEMU accepts them. QEMU
        # accepts connections only while it serves no client. Therefore retry for a short time if
        # the backlog is full.
        retry_until = min(deadline, loop.time() + 2 * BUSY_GRACE)
        while (sock := _connect_unix(target)) is None:
            if loop.time() >= retry_until:
                raise _busy(target, "more clients are waiting")
            await asyncio.sleep(0.02)
        return sock
    try:
        async with asyncio.timeout_at(deadline):
            return await _connect_tcp(target)
    except socket.gaierror as error:
        raise InputError(
            f"the host in {address!r} is unknown: {error.strerror}",
            "specify PATH, unix:PATH or tcp:HOST:PORT",
            code=Code.MONITOR,
        ) from error
    except TimeoutError as error:
        raise MonitorError(
            f"{address} does not respond", "check the host, the port and the firewall"
        ) from error
    except OSError as error:
        raise MonitorError(
            f"cannot connect to {address}: {error.strerror or error}",
            "specify the address of QEMU's -qmp tcp:HOST:PORT,server=on,wait=off option",
        ) from error


def parse_address(address: str) -> str | tuple[str, int]:
    """Return the path of a UNIX socket, or (host, port) of a TCP socket.

    An address without a ``unix:`` or ``tcp:`` prefix is a TCP address if it has the form
    ``HOST:PORT``, has no slash before the colon, and is not the path of an existing file.

    :raises InputError: If the address is empty, or if its port or path is invalid.
    """
    if address.startswith("unix:"):
        return _checked_path(address.removeprefix("unix:"), address)
    host, colon, port = address.removeprefix("tcp:").rpartition(":")
    looks_tcp = colon and port.isascii() and port.isdecimal() and "/" not in host
    if not address.startswith("tcp:") and (not looks_tcp or os.path.lexists(address)):
        return _checked_path(address, address)
    if not looks_tcp or not 0 < int(port[:6]) < 65536:
        raise InputError(
            f"{address!r} is not a valid address", "specify PATH, unix:PATH or tcp:HOST:PORT"
        )
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def _checked_path(path: str, address: str) -> str:
    # sun_path holds 108 bytes, including the terminating zero (unix(7)).
    if not path or "\0" in path or len(os.fsencode(path)) > 107:
        raise InputError(
            f"{address!r} is not a valid socket path",
            "specify a path of 1 to 107 bytes, for example a relative path",
        )
    return path


def _connect_unix(path: str) -> socket.socket | None:
    """Return a connected socket, or None if the listener's backlog is full."""
    sock = DataSocket()
    sock.setblocking(False)
    try:
        # On a UNIX socket, connect() completes or fails immediately. asyncio's sock_connect()
        # treats EAGAIN (the backlog is full) as "in progress", and later as success.
        sock.connect(path)
        return sock
    except FileNotFoundError as error:
        if path.startswith("@"):
            cause = f"{path} does not exist, and qemu-prefault does not support abstract sockets"
            remedy = "start QEMU with a second -qmp unix:PATH,server=on,wait=off for qemu-prefault"
            _fail(sock, InputError(cause, remedy), error)
        _fail(sock, InputError(f"the socket {path} does not exist", _REMEDY_ADDRESS), error)
    except PermissionError as error:
        remedy = "run qemu-prefault as root or as QEMU's user"
        _fail(
            sock,
            MonitorError(f"this process has no permission to connect to {path}", remedy),
            error,
        )
    except ConnectionRefusedError as error:
        if not _is_socket(path):
            _fail(sock, InputError(f"{path} is not a socket", _REMEDY_ADDRESS), error)
        cause = f"no process listens on {path}, probably because QEMU has exited"
        _fail(
            sock, MonitorError(cause, "start QEMU, or specify the socket of a running QEMU"), error
        )
    except BlockingIOError:
        sock.close()
        return None
    except OSError as error:
        cause = f"cannot connect to {path}: {error.strerror or error}"
        _fail(sock, MonitorError(cause, _REMEDY_ADDRESS), error)


def _fail(sock: socket.socket, error: QemuPrefaultError, cause: OSError) -> NoReturn:
    sock.close()
    raise error from cause


def _is_socket(path: str) -> bool:
    import stat  # noqa: PLC0415 - only for an error message

    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


async def _connect_tcp(target: tuple[str, int]) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(*target, type=socket.SOCK_STREAM)
    last: OSError = OSError("no address")
    for family, kind, protocol, _, sockaddr in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, sockaddr)
            return sock
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
    raise last


def _busy(address: str, detail: str = "") -> MonitorBusyError:
    more = f" ({detail})" if detail else ""
    return MonitorBusyError(
        f"another QMP client uses {address}{more}, and QEMU serves one client at a time",
        _REMEDY_BUSY,
    )


async def await_greeting(sock: socket.socket, address: str, deadline: float) -> None:
    """Wait for the peer's first bytes, and check that they begin a JSON object.

    :param address: The name of the connection, for error messages.
    :param deadline: The time of the event loop, in seconds, at which the wait ends.
    :raises MonitorBusyError: If QEMU serves another client.
    :raises MonitorError: If the peer is silent, closes the connection, or is not a QMP server.
    """
    loop = asyncio.get_running_loop()
    limit = min(deadline, loop.time() + GREETING_TIMEOUT)
    if not await _readable(sock, min(limit, loop.time() + BUSY_GRACE)):
        place = _place(sock)
        if place is _Place.BEHIND:
            raise _busy(address)
        if place is _Place.QUEUED:
            limit = deadline  # QEMU serves no client. Its main loop may be busy.
        if not await _readable(sock, limit):
            raise _silent(address, _place(sock))
    try:
        start = sock.recv(64, socket.MSG_PEEK)
    except DescriptorsError as error:
        raise not_qmp(address, f"it sent {error}") from error
    except OSError as error:
        raise closed_early(address) from error
    if not start:
        raise closed_early(address)
    if start[:1] == b"\xff":  # IAC, RFC 854
        raise MonitorError(
            f"{address} negotiates telnet options",
            "start QEMU with -qmp tcp:HOST:PORT,server=on,wait=off instead of telnet:",
            code=Code.MONITOR_NOT_QMP,
        )
    if start.lstrip()[:1] not in (b"{", b""):
        human = b"QEMU" in start
        raise not_qmp(address, "it is a human monitor" if human else "its first bytes are not JSON")
    if start.lstrip()[1:2] in (b"\r", b"\n"):
        raise MonitorError(
            f"{address} sends pretty-printed QMP, in which a message spans several lines",
            "start QEMU with -qmp instead of -qmp-pretty, or with pretty=off",
            code=Code.MONITOR_NOT_QMP,
        )


def closed_early(address: str) -> MonitorError:
    """Return the error for a peer that closed the connection before its greeting."""
    return MonitorError(
        f"{address} closed the connection before it sent a greeting",
        "check whether QEMU is exiting, and whether the socket is QEMU's QMP monitor",
        code=Code.MONITOR_CLOSED,
    )


def not_qmp(address: str, why: str) -> MonitorError:
    """Return the error for a peer that is not a QMP server.

    :param why: The reason, as a clause for the message.
    """
    return MonitorError(
        f"{address} is not a QMP server: {why}", _REMEDY_ADDRESS, code=Code.MONITOR_NOT_QMP
    )


def has_closed(error: BaseException | None) -> bool:
    """Return whether an exception of a connection means that the peer has closed it."""
    return isinstance(error, (EOFError, OSError)) and not isinstance(error, DescriptorsError)


def brief(error: BaseException) -> str:
    """Return a short description of an exception from the qemu.qmp library."""
    # str() of such an error quotes the whole message, which may be megabytes long.
    inner = error.exc if isinstance(error, ConnectError) else error
    text = getattr(inner, "error_message", None) or type(inner).__name__
    if isinstance(inner, ValueError) and "limit" in str(inner)[:200]:
        text = f"a message of more than {MAX_REPLY >> 20} MiB"
    if isinstance(inner, (TooLargeError, DescriptorsError)):
        text = str(inner)
    return str(text)[:120].rstrip(".")


async def _readable(sock: socket.socket, until: float) -> bool:
    """Return True when data or EOF arrives, or False at the time ``until``.

    :param until: The time of the event loop, in seconds.
    """
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(True)

    loop.add_reader(sock.fileno(), wake)
    try:
        async with asyncio.timeout_at(until):
            await ready
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(sock.fileno())


class _Place(enum.Enum):
    """The state of a client's connection on the server's side."""

    ACCEPTED = "accepted"
    QUEUED = "waiting, and no client is served"
    BEHIND = "waiting, and another client is served"
    UNKNOWN = "unknown"


def _place(sock: socket.socket) -> _Place:
    """Return the state of this connection according to /proc/net/unix.

    This file lists the server's end of a connection with the path of the listening socket. The
    state of the server's end is 03 if the server has accepted the connection, and 02 if the
    connection is in the backlog (unix_seq_show(), net/unix/af_unix.c). If QEMU has accepted one
    client and another client is in the backlog, this process is the client in the backlog.
    Otherwise QEMU would have sent a greeting to this process.
    """
    if sock.family != socket.AF_UNIX:
        return _place_of_tcp(sock)
    try:
        name = os.fsencode(sock.getpeername())  # the path that the server bound
        states = _states_of(name)
    except OSError:
        return _Place.UNKNOWN
    if not states & {b"02", b"03"}:  # the server is in another network namespace
        return _Place.UNKNOWN
    if b"02" not in states:
        return _Place.ACCEPTED
    return _Place.BEHIND if b"03" in states else _Place.QUEUED


def _place_of_tcp(sock: socket.socket) -> _Place:
    """Return whether a server on this host has accepted a TCP connection.

    /proc/net/tcp shows the server's end of a connection with the inode 0 until the server accepts
    the connection (get_tcp4_sock(), net/ipv4/tcp_ipv4.c). QEMU does not accept a client while it
    serves another one. If the server is on another host, the table does not show its end.
    """
    try:
        ports = f"{sock.getpeername()[1]:04X}".encode(), f"{sock.getsockname()[1]:04X}".encode()
        for name in ("tcp", "tcp6"):
            for line in _lines_of(f"/proc/net/{name}", b":" + ports[1]):
                row = line.split()
                # "SLOT: ADDRESS:PORT ADDRESS:PORT STATE TX:RX TIMER:WHEN RETRIES UID TIMEOUT INODE"
                ends = tuple(end.rpartition(b":")[2] for end in row[1:3])
                if ends == ports and row[3] == b"01" and len(row) > 9 and row[9] != b"0":
                    return _Place.ACCEPTED
    except OSError:
        pass
    return _Place.UNKNOWN


def _lines_of(table: str, name: bytes) -> Iterator[bytes]:
    """Yield the lines of a table of sockets that contain ``name``.

    :raises OSError: If the table cannot be read, or if it is larger than :data:`MAX_TABLE`.
    """
    left = MAX_TABLE
    with open(table, "rb") as lines:
        for line in lines:
            left -= len(line)
            if left < 0:
                raise too_large(table, MAX_TABLE)
            if name in line:
                yield line


def _states_of(name: bytes) -> set[bytes]:
    """Return the states of all sockets with this name in /proc/net/unix.

    Other users can add any number of lines to this file, so the function keeps no lines.

    :raises OSError: If the file cannot be read, or if it is larger than :data:`MAX_TABLE`.
    """
    states = set()
    for line in _lines_of("/proc/net/unix", name):
        row = line.split(None, 7)
        if len(row) == 8 and row[7].rstrip(b"\n") == name:
            states.add(row[5])
    return states


def _silent(address: str, place: _Place) -> QemuPrefaultError:
    if place is _Place.BEHIND:
        return _busy(address)
    if place is _Place.UNKNOWN:  # on TCP, a busy monitor and a silent listener look the same
        return MonitorBusyError(
            f"{address} sends no greeting, probably because another QMP client uses this socket",
            f"{_REMEDY_BUSY}\na monitor with websocket=on or tls-creds also sends no greeting, and "
            "qemu-prefault supports neither",
        )
    what = (
        "accepted the connection, but sent no QMP greeting"
        if place is _Place.ACCEPTED
        else "does not accept connections, because QEMU is stopped or blocked"
    )
    return MonitorError(f"{address} {what}", REMEDY_SILENT, code=Code.MONITOR_SILENT)
