# SPDX-License-Identifier: GPL-2.0-or-later
"""Reach a QMP server: connect to its socket, and wait until it greets.

A QMP socket serves one client at a time: the second connect() succeeds and then hears nothing.
:func:`await_greeting` tells that from a server that is slow, silent, or none.
"""

from __future__ import annotations

import asyncio
import enum
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from qemu.qmp import ConnectError

from ..errors import Code, InputError, MonitorBusyError, MonitorError, QemuPrefaultError

#: Makes a connection on which QEMU is about to greet; returns the socket, non-blocking, and the
#: UUID that the VM at its other end must have.
Dial = Callable[[], Awaitable[tuple[socket.socket, str]]]

#: A reply longer than this ends the connection. ``info mtree -f`` of a guest with hundreds of
#: vCPUs and devices stays below 1 MiB; asyncio buffers at most twice the limit.
MAX_REPLY: Final = 4 << 20


#: How long an accepted QMP client may wait for the greeting, seconds. QEMU sends it from its
#: main loop, in microseconds if nothing blocks that.
GREETING_TIMEOUT: Final = 2.0
#: After this many seconds without a greeting it is worth asking the kernel who is served.
BUSY_GRACE: Final = 0.25


_REMEDY_ADDRESS: Final = "give the socket of QEMU's option -qmp unix:PATH,server=on,wait=off"
_REMEDY_BUSY: Final = (
    "close the other client (libvirt, a QMP shell), or start QEMU with a second "
    "-qmp unix:PATH,server=on,wait=off for this tool"
)
REMEDY_SILENT: Final = (
    "check that the socket is a QMP monitor (a guest agent never greets), and that QEMU is "
    "neither stopped nor blocked in its main loop"
)


async def connect(address: str, deadline: float) -> socket.socket:
    """Return a connected, non-blocking socket."""
    target = parse_address(address)
    loop = asyncio.get_running_loop()
    if isinstance(target, str):
        # Clients that gave up fill the backlog until QEMU accepts and discards them, which it
        # does as soon as nobody is served: so a full one is worth a second look.
        retry_until = min(deadline, loop.time() + 2 * BUSY_GRACE)
        while (sock := _connect_unix(target)) is None:
            if loop.time() >= retry_until:
                raise _busy(target, "with more clients waiting")
            await asyncio.sleep(0.02)
        return sock
    try:
        async with asyncio.timeout_at(deadline):
            return await _connect_tcp(target)
    except socket.gaierror as error:
        raise InputError(
            f"unknown host in {address!r}: {error.strerror}",
            "give PATH, unix:PATH or tcp:HOST:PORT",
            code=Code.MONITOR,
        ) from error
    except TimeoutError as error:
        raise MonitorError(f"{address} does not answer", "check host, port and firewall") from error
    except OSError as error:
        raise MonitorError(
            f"cannot connect to {address}: {error.strerror or error}",
            "give the address of QEMU's option -qmp tcp:HOST:PORT,server=on,wait=off",
        ) from error


def parse_address(address: str) -> str | tuple[str, int]:
    """Return a UNIX socket's path, or (host, port).

    ``unix:`` and ``tcp:`` decide; without them it is TCP if it looks like ``HOST:PORT``, has
    no slash and no file has that name.

    :raises InputError: if the address is empty or has an impossible port or path.
    """
    if address.startswith("unix:"):
        return _checked_path(address.removeprefix("unix:"), address)
    host, colon, port = address.removeprefix("tcp:").rpartition(":")
    looks_tcp = colon and port.isascii() and port.isdecimal() and "/" not in host
    if not address.startswith("tcp:") and (not looks_tcp or os.path.lexists(address)):
        return _checked_path(address, address)
    if not looks_tcp or not 0 < int(port[:6]) < 65536:
        raise InputError(f"{address!r} is no address", "give PATH, unix:PATH or tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def _checked_path(path: str, address: str) -> str:
    # sun_path holds 108 bytes with the terminating zero (unix(7))
    if not path or "\0" in path or len(os.fsencode(path)) > 107:
        raise InputError(
            f"{address!r} is no path of a socket", "a path of 1 to 107 bytes; cd nearer if longer"
        )
    return path


def _connect_unix(path: str) -> socket.socket | None:
    """Return a connected socket; None if the listener's backlog is full."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        # On UNIX sockets this completes at once or fails. asyncio's sock_connect() would take
        # EAGAIN (the backlog is full) for "in progress" and then for success.
        sock.connect(path)
        return sock
    except FileNotFoundError as error:
        _fail(sock, InputError(f"there is no socket {path}", _REMEDY_ADDRESS), error)
    except PermissionError as error:
        remedy = "run as root or as the user QEMU runs as"
        _fail(sock, MonitorError(f"no permission to connect to {path}", remedy), error)
    except ConnectionRefusedError as error:
        if not _is_socket(path):
            _fail(sock, InputError(f"{path} is not a socket", _REMEDY_ADDRESS), error)
        cause = f"nobody listens on {path}: left over from a QEMU that is gone"
        _fail(sock, MonitorError(cause, "start QEMU, or give the socket of a running one"), error)
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
        f"another QMP client holds {address}{more}: QEMU serves one at a time", _REMEDY_BUSY
    )


async def await_greeting(sock: socket.socket, address: str, deadline: float) -> None:
    """Wait until the peer has said something, and check by its first bytes that it is JSON.

    :raises MonitorBusyError: if another client is being served.
    :raises MonitorError: if the peer is silent, closes, or speaks something else.
    """
    loop = asyncio.get_running_loop()
    limit = min(deadline, loop.time() + GREETING_TIMEOUT)
    if not await _readable(sock, min(limit, loop.time() + BUSY_GRACE)):
        place = _place(sock)
        if place is _Place.BEHIND:
            raise _busy(address)
        if place is _Place.QUEUED:
            limit = deadline  # nobody is served: QEMU's main loop is busy, and may come back
        if not await _readable(sock, limit):
            raise _silent(address, _place(sock))
    try:
        start = sock.recv(64, socket.MSG_PEEK)
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
        what = "a human monitor" if b"QEMU" in start else "no QMP monitor"
        raise not_qmp(address, f"it looks like {what}")
    if start.lstrip()[1:2] in (b"\r", b"\n"):
        raise MonitorError(
            f"{address} speaks QMP, but pretty-printed over several lines",
            "start QEMU with -qmp instead of -qmp-pretty, or with pretty=off",
            code=Code.MONITOR_NOT_QMP,
        )


def closed_early(address: str) -> MonitorError:
    return MonitorError(
        f"{address} closed the connection before any greeting",
        "see whether QEMU is just exiting, and whether the socket is its QMP monitor",
        code=Code.MONITOR_CLOSED,
    )


def not_qmp(address: str, why: str) -> MonitorError:
    return MonitorError(
        f"{address} does not speak QMP: {why}", _REMEDY_ADDRESS, code=Code.MONITOR_NOT_QMP
    )


def brief(error: BaseException) -> str:
    # str() of qemu.qmp's errors quotes the whole message, which may be megabytes.
    inner = error.exc if isinstance(error, ConnectError) else error
    text = getattr(inner, "error_message", None) or type(inner).__name__
    if isinstance(inner, ValueError) and "limit" in str(inner)[:200]:
        text = f"a message of more than {MAX_REPLY >> 20} MiB"
    return str(text)[:120].rstrip(".")


async def _readable(sock: socket.socket, until: float) -> bool:
    """Wait until there is something to read, or EOF; return False at time `until`."""
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
    """Where a connection stands at the listener."""

    ACCEPTED = "accepted"
    QUEUED = "nobody is being served"
    BEHIND = "another client is being served"
    UNKNOWN = "cannot be known"


def _place(sock: socket.socket) -> _Place:
    """Tell from /proc/net/unix where we stand.

    The server's end of a connection bears the name of the listening socket; state 03 means
    accepted, 02 still in the backlog (unix_seq_show(), net/unix/af_unix.c). With one client
    accepted and one in the backlog, we are the latter: an accepted one would be greeted.
    """
    if sock.family != socket.AF_UNIX:
        return _Place.UNKNOWN
    try:
        name = os.fsencode(sock.getpeername())  # as the server bound it
        with open("/proc/net/unix", "rb") as table:
            rows = [row for row in (line.split(None, 7) for line in table) if len(row) == 8]
    except OSError:
        return _Place.UNKNOWN
    states = {row[5] for row in rows if row[7].rstrip(b"\n") == name}
    if not states & {b"02", b"03"}:  # another network namespace
        return _Place.UNKNOWN
    if b"02" not in states:
        return _Place.ACCEPTED
    return _Place.BEHIND if b"03" in states else _Place.QUEUED


def _silent(address: str, place: _Place) -> QemuPrefaultError:
    if place is _Place.BEHIND:
        return _busy(address)
    if place is _Place.UNKNOWN:  # TCP: a busy monitor and a dumb listener look the same
        return MonitorBusyError(
            f"{address} sends no greeting: most likely another QMP client holds it", _REMEDY_BUSY
        )
    what = (
        "accepted the connection, but sent no QMP greeting"
        if place is _Place.ACCEPTED
        else "does not accept connections: QEMU is stopped or blocked"
    )
    return MonitorError(f"{address} {what}", REMEDY_SILENT, code=Code.MONITOR_SILENT)
