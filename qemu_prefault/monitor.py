# SPDX-License-Identifier: GPL-2.0-or-later
"""The conversation with QEMU: one QMP connection, its queries, its events.

What makes this more than a call to ``qemu.qmp``:

* **A QMP socket serves one client at a time.** The second connect() succeeds and then hears
  nothing, for the kernel queues it (chardev/char-socket.c stops listening while a client is
  there). A careless client hangs for ever. :meth:`Monitor.connect` says
  :class:`MonitorBusyError` within two seconds, usually at once: ``/proc/net/unix`` shows
  that somebody else was accepted and we were not.
* **Nothing is sent before the greeting.** What a queued client writes would be executed when
  its turn comes, long after it gave up.
* **The peer may be anything.** A guest agent, a human monitor, a proxy, a program that sends
  100 MB of noise: replies are bounded, every wait has a limit, and whatever goes wrong leaves
  as a :class:`~qemu_prefault.errors.QemuPrefaultError` with a remedy.
* **QEMU may die in mid-command.** Event streams of ``qemu.qmp`` then go silent for ever; the
  ones here end.

:func:`read_machine` gathers what the rest of the tool needs to know, in two round trips.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from .errors import InputError, MonitorError, QemuPrefaultError, RefusedError
from .layout import (
    FlatRange,
    LayoutError,
    Memdev,
    MemoryDevice,
    NumaNode,
    RamBlock,
    Section,
    build_sections,
    expect_array,
    expect_bool,
    expect_int,
    expect_object,
    expect_str,
    memdev_nodes,
    parse_gpa2hva,
    parse_memdevs,
    parse_memory_devices,
    parse_mtree,
    parse_numa,
    parse_ramblocks,
)
from .report import Stage2

#: A reply longer than this ends the connection. ``info mtree -f`` of a guest with hundreds of
#: vCPUs and devices stays below 1 MiB; asyncio buffers at most twice the limit.
MAX_REPLY: Final = 4 << 20
#: An address that names a domain of libvirt's; see :mod:`qemu_prefault.libvirt.bridge`.
LIBVIRT: Final = "libvirt:"
#: How long an accepted QMP client may wait for the greeting, seconds. QEMU sends it from its
#: main loop, in microseconds if nothing blocks that.
GREETING_TIMEOUT: Final = 2.0
#: After this many seconds without a greeting it is worth asking the kernel who is served.
BUSY_GRACE: Final = 0.25
#: Events kept for a reader that does not read; the oldest are dropped.
MAX_EVENTS: Final = 1024
#: Ranges of guest memory beyond this are no machine we know, but an attempt on our patience.
MAX_RANGES: Final = 4096
_PAGE: Final = 4096


class MonitorBusyError(RefusedError):
    """Another client holds the QMP socket."""

    code = "monitor-busy"


class CommandError(MonitorError):
    """QEMU understood a command and refused it.

    :ivar error_class: QMP's error class, e.g. ``CommandNotFound``.
    :ivar desc: QEMU's own words.
    """

    code = "monitor-command"

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.error_class = error_class
        self.desc = desc


_REMEDY_ADDRESS: Final = "give the socket of QEMU's option -qmp unix:PATH,server=on,wait=off"
_REMEDY_BUSY: Final = (
    "close the other client (libvirt, a QMP shell), or start QEMU with a second "
    "-qmp unix:PATH,server=on,wait=off for this tool"
)
_REMEDY_SILENT: Final = (
    "check that the socket is a QMP monitor (a guest agent never greets), and that QEMU is "
    "neither stopped nor blocked in its main loop"
)


@dataclass(frozen=True, slots=True)
class Event:
    """An asynchronous event of QEMU. `seconds` is QEMU's wall clock, since the Epoch."""

    name: str
    data: Mapping[str, object]
    seconds: float


class EventStream:
    """Chosen events, in order, as an async iterator that ends when the connection does.

    Obtained from :meth:`Monitor.events`. Holds the newest :data:`MAX_EVENTS` unread events;
    `dropped` counts what an absent reader has missed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.dropped = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._ended = False
        self._changed = asyncio.Event()

    def _put(self, event: Event) -> None:
        if self.names and event.name not in self.names:
            return
        self.dropped += len(self._events) == MAX_EVENTS
        self._events.append(event)
        self._changed.set()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def get(self, timeout: float | None = None) -> Event | None:
        """Return the next event; None once the connection has ended.

        :param timeout: seconds; None waits as long as it takes.
        :raises TimeoutError: if no event came in time.
        """
        if not self._events and not self._ended:
            self._changed.clear()
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        return self._events.popleft() if self._events else None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event


class _Dispatcher(EventListener):
    """Hands events to our bounded streams; the inherited one keeps every event for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[EventStream] = []

    async def put(self, event: Message) -> None:
        parsed = _event(event)
        if parsed is not None:
            for stream in self.streams:
                stream._put(parsed)


class _Client(QMPClient):
    """QMPClient that does not pretty-print every message for a log nobody reads.

    The two hooks are meant to be overridden. Formatting costs more than all else for large
    replies, in memory too.

    :ivar cause: what ended the connection. ``disconnect()`` is to tell, but with commands
        pending it may raise an AssertionError of its own instead (qemu.qmp 0.0.6).
    """

    cause: Exception | None = None

    async def _bh_recv_message(self) -> None:
        try:
            await super()._bh_recv_message()
        except Exception as error:
            self.cause = error
            raise

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """An established QMP session. Use :meth:`connect`, not the constructor.

    :ivar address: what the user gave.
    :ivar version: QEMU's version, e.g. ``10.0.13``.
    :ivar package: the distributor's suffix, e.g. ``Debian 1:10.0.13+ds-0+deb13u1``; may be empty.
    :ivar peer_pid: process that listens on the socket (SO_PEERCRED: who called listen()), as
        this pid namespace sees it; None for TCP, for libvirt's domains, and for a process
        outside the namespace.
    :ivar domain_uuid: of the libvirt domain that was asked for; None if it was a socket.
    """

    def __init__(
        self,
        client: _Client,
        sock: socket.socket,
        address: str,
        command_timeout: float,
        domain_uuid: str | None = None,
    ) -> None:
        self.address = address
        self.domain_uuid = domain_uuid
        self.command_timeout = command_timeout
        self.version, self.package = _version(client.greeting)
        # At the other end of a bridge to libvirt is a process of our own.
        self.peer_pid = None if domain_uuid else _peer_pid(sock)
        self._client = client
        self._sock = sock
        self._dispatcher = _Dispatcher()
        client.register_listener(self._dispatcher)
        self._watcher = asyncio.create_task(self._watch())

    # --- life ---

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, address: str, *, connect_timeout: float = 5.0, command_timeout: float = 30.0
    ) -> AsyncIterator[Monitor]:
        """Connect to QEMU's QMP socket, negotiate, and disconnect when the block is left.

        :param address: path of a UNIX socket (``unix:PATH`` too), or ``HOST:PORT``
            (``tcp:HOST:PORT`` too), or ``libvirt:DOMAIN`` for libvirt's own connection.
        :param connect_timeout: seconds for everything up to an established session. A socket
            that does not greet is given up after at most :data:`GREETING_TIMEOUT`.
        :param command_timeout: seconds each command may take, unless the call says otherwise.
        :raises InputError: if the address is none, or names nothing.
        :raises MonitorBusyError: if another client is being served.
        :raises MonitorError: if there is no QMP to be had, for the reason given.
        """
        monitor = await cls._open(address, connect_timeout, command_timeout)
        try:
            yield monitor
        finally:
            await monitor._close()

    @classmethod
    async def _open(cls, address: str, timeout: float, command_timeout: float) -> Monitor:
        deadline = asyncio.get_running_loop().time() + timeout
        uuid = None
        if address.startswith(LIBVIRT):
            from .libvirt.bridge import open_bridge  # noqa: PLC0415

            sock, uuid = await open_bridge(address.removeprefix(LIBVIRT))
            deadline = asyncio.get_running_loop().time() + timeout
        else:
            sock = await _connect(address, deadline)
        client = _Client(readbuflen=MAX_REPLY)
        client.events.names = {""}  # the built-in listener would keep every event for ever
        try:
            await _await_greeting(sock, address, deadline)
            await _negotiate(client, sock, address, deadline)
            return cls(client, sock, address, command_timeout, uuid)
        except BaseException:
            await _hang_up(client, sock)
            raise

    async def _close(self) -> None:
        self._watcher.cancel()
        await _hang_up(self._client, self._sock)
        self._end_streams()

    async def _watch(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        self._end_streams()

    def _end_streams(self) -> None:
        for stream in self._dispatcher.streams:
            stream._end()

    @property
    def alive(self) -> bool:
        """Whether the session still stands."""
        return self._client.runstate == Runstate.RUNNING

    def fileno(self) -> int:
        """Return the socket's file descriptor, e.g. for a guard process to inherit.

        Whoever holds it keeps the monitor occupied, and must not read or write while this
        object lives.
        """
        return self._sock.fileno()

    # --- commands ---

    async def execute(
        self, command: str, /, *, timeout: float | None = None, **arguments: object
    ) -> object:
        """Execute a QMP command and return its decoded answer.

        Argument names with dashes are given with underscores (``command_line``). Concurrent
        calls are pipelined; QEMU answers in order.

        :param timeout: seconds; default is `command_timeout`.
        :raises CommandError: if QEMU refuses.
        :raises MonitorError: if the connection broke, or the answer did not come in time.
        """
        args = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.execute_raw(command, args, timeout=timeout)

    async def execute_raw(
        self, command: str, arguments: Mapping[str, object], *, timeout: float | None = None
    ) -> object:
        """Like :meth:`execute`, with the arguments as QMP spells them."""
        limit = self.command_timeout if timeout is None else timeout
        try:
            # Not wait_for(): before Python 3.12 it loses a cancellation that comes together
            # with the answer, and the caller goes on as if nobody wanted it to end.
            async with asyncio.timeout(limit):
                return await self._client.execute(command, dict(arguments) or None)
        except TimeoutError as error:
            raise MonitorError(
                f"QEMU did not answer {command} within {limit:g} s",
                "its main loop may be blocked; the command may still be executed later",
                code="monitor-timeout",
            ) from error
        except ExecuteError as error:
            raise CommandError(command, error.error_class, str(error)) from error
        except (ExecInterruptedError, StateError) as error:
            raise self._dead(command) from error
        except (QMPError, OSError, ValueError, KeyError) as error:
            # BadReplyError and its like; KeyError comes from qemu.qmp when a reply is sent twice
            raise _not_qmp(self.address, f"its answer to {command} is malformed") from error

    @contextlib.contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Let every command within the block take so long, unless the call says otherwise."""
        before, self.command_timeout = self.command_timeout, seconds
        try:
            yield
        finally:
            self.command_timeout = before

    async def hmp(self, line: str, *, timeout: float | None = None) -> str:
        """Execute a command of the human monitor and return its text.

        The human monitor has no errors: what it could not do is in the text.

        :raises MonitorError: as :meth:`execute`.
        """
        answer = await self.execute("human-monitor-command", command_line=line, timeout=timeout)
        return expect_str(answer, f'the answer to "{line}"')

    def _dead(self, command: str) -> MonitorError:
        """Return the error for a connection that ended while `command` was under way."""
        cause = self._client.cause
        if cause is None or isinstance(cause, (EOFError, OSError)):
            return MonitorError(
                f"QEMU closed the QMP connection {self.address} during {command}",
                "see whether QEMU is still running; the command may or may not have taken effect",
                code="monitor-closed",
            )
        return _not_qmp(self.address, f"during {command} it sent {_brief(cause)}")

    # --- events ---

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        """Subscribe to the named events (to all, if none is named) within the block."""
        stream = EventStream(names)
        if not self.alive:
            stream._end()
        self._dispatcher.streams.append(stream)
        try:
            yield stream
        finally:
            self._dispatcher.streams.remove(stream)


# --- connecting ---


async def _connect(address: str, deadline: float) -> socket.socket:
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
            code="monitor",
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


async def _await_greeting(sock: socket.socket, address: str, deadline: float) -> None:
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
        raise _closed_early(address) from error
    if not start:
        raise _closed_early(address)
    if start.lstrip()[:1] not in (b"{", b""):
        what = "a human monitor" if b"QEMU" in start or start[:1] == b"\xff" else "no QMP monitor"
        raise _not_qmp(address, f"it looks like {what}")


def _closed_early(address: str) -> MonitorError:
    return MonitorError(
        f"{address} closed the connection before any greeting",
        "see whether QEMU is just exiting, and whether the socket is its QMP monitor",
        code="monitor-closed",
    )


def _not_qmp(address: str, why: str) -> MonitorError:
    return MonitorError(
        f"{address} does not speak QMP: {why}", _REMEDY_ADDRESS, code="monitor-not-qmp"
    )


def _brief(error: BaseException) -> str:
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
    return MonitorError(f"{address} {what}", _REMEDY_SILENT, code="monitor-silent")


async def _negotiate(client: _Client, sock: socket.socket, address: str, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(max(loop.time() + 0.1, deadline)):
            await client.connect(sock)
    except TimeoutError as error:
        raise MonitorError(
            f"{address} did not finish the QMP greeting", _REMEDY_SILENT, code="monitor-silent"
        ) from error
    except Exception as error:  # qemu.qmp wraps anything that a peer can provoke
        inner = error.exc if isinstance(error, ConnectError) else error
        if isinstance(inner, (EOFError, OSError)):
            raise _closed_early(address) from error
        raise _not_qmp(address, _brief(error)) from error


async def _hang_up(client: _Client, sock: socket.socket) -> None:
    # disconnect() re-raises whatever ended the connection (EOFError, OSError, …), and it first
    # flushes to a peer that may not read. Neither matters any more.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(1.0):
            await client.disconnect()
    sock.close()


def _version(greeting: object) -> tuple[str, str]:
    """Return (version, package) of a greeting."""
    qmp = getattr(greeting, "QMP", None)
    told = expect_object(getattr(qmp, "version", None), "the version in the QMP greeting")
    qemu = expect_object(told.get("qemu"), "the version in the QMP greeting")
    parts = [
        expect_int(qemu.get(k), "QEMU's version", 0, 9999) for k in ("major", "minor", "micro")
    ]
    package = expect_str(told.get("package", ""), "QEMU's package version")
    return ".".join(map(str, parts)), package[:200]


def _peer_pid(sock: socket.socket) -> int | None:
    if sock.family != socket.AF_UNIX:
        return None
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid) or None


def _event(message: Message) -> Event | None:
    name, data, stamp = message.get("event"), message.get("data", {}), message.get("timestamp")
    if not isinstance(name, str) or not isinstance(data, dict):
        return None
    seconds = 0.0
    if isinstance(stamp, dict):
        whole, micro = stamp.get("seconds"), stamp.get("microseconds")
        if type(whole) is int and type(micro) is int and 0 <= whole < 1 << 40:
            seconds = whole + max(0, min(micro, 999_999)) / 1e6
    return Event(name, data, seconds)


# --- what the tool wants to know -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vcpu:
    """A vCPU: QEMU's index, its thread as QEMU's pid namespace numbers it, its NUMA node."""

    index: int
    thread_id: int
    qom_path: str
    node: int | None


@dataclass(frozen=True, slots=True)
class Balloon:
    """The balloon, bytes: the guest's memory as it is, and as it would be deflated."""

    actual: int
    total: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What QEMU said about itself, all at one moment.

    :ivar version: of QEMU, e.g. ``10.0.13``.
    :ivar machine_type: e.g. ``pc-q35-10.0-machine``; None if not told.
    :ivar status: run state (``query-status``): ``running``, ``paused``, ``prelaunch`` …
    :ivar kvm: whether the guest runs under KVM.
    :ivar migration: status of a migration (``query-migrate``); None if there was none.
    :ivar dirty_rate: status of dirty-rate measuring (``query-dirty-rate``); None if unknown.
    :ivar balloon: None without a balloon that works.
    """

    version: str
    package: str
    machine_type: str | None
    status: str
    running: bool
    kvm: bool
    vcpus: tuple[Vcpu, ...]
    ranges: tuple[FlatRange, ...]
    ramblocks: tuple[RamBlock, ...]
    sections: tuple[Section, ...]
    memdevs: tuple[Memdev, ...]
    memory_devices: tuple[MemoryDevice, ...]
    numa: tuple[NumaNode, ...]
    balloon: Balloon | None
    migration: str | None
    dirty_rate: str | None


async def read_machine(monitor: Monitor) -> Machine:
    """Ask QEMU for everything the plan needs.

    Queries go out together. The memory map is read before and after the host addresses: if
    firmware or hotplug changed it in between, all of it is read again.

    :raises LayoutError: if the answers contradict each other.
    :raises MonitorError: if the conversation fails, or the map never holds still.
    """
    for _ in range(10):
        machine = await _read_once(monitor)
        if machine is not None:
            return machine
    raise MonitorError(
        "the guest's memory map kept changing while it was read",
        "its firmware is probably still at work: try again in a few seconds",
        code="layout-unstable",
    )


async def read_running(monitor: Monitor) -> bool:
    """Return whether the guest's vCPUs run at this moment."""
    run = expect_object(await monitor.execute("query-status"), "query-status")
    return expect_bool(run.get("running"), "running of query-status")


async def read_status(monitor: Monitor) -> str:
    """Return the run state as ``query-status`` spells it at this moment."""
    run = expect_object(await monitor.execute("query-status"), "query-status")
    return expect_str(run.get("status"), "status of query-status")


async def read_migration(monitor: Monitor) -> str:
    """Return the ``status`` of ``query-migrate``; ``none`` if there was no migration."""
    migrate = expect_object(await monitor.execute("query-migrate"), "query-migrate")
    return expect_str(migrate.get("status", "none"), "status of query-migrate")


async def _read_once(monitor: Monitor) -> Machine | None:
    """Return the machine, or None if its memory map changed meanwhile."""
    (
        status,
        kvm,
        cpus,
        mtree,
        ramblock,
        memdev,
        devices,
        summary,
        numa,
        balloon,
        migrate,
        dirty_rate,
        machine_type,
    ) = await _all(
        monitor.execute("query-status"),
        monitor.execute("query-kvm"),
        monitor.execute("query-cpus-fast"),
        monitor.hmp("info mtree -f"),
        monitor.hmp("info ramblock"),
        monitor.execute("query-memdev"),
        monitor.execute("query-memory-devices"),
        monitor.execute("query-memory-size-summary"),
        monitor.hmp("info numa"),
        _optional(monitor.execute("query-balloon")),
        _optional(monitor.execute("query-migrate")),
        _optional(monitor.execute("query-dirty-rate")),
        _optional(monitor.execute("qom-get", path="/machine", property="type")),
    )
    run = expect_object(status, "query-status")
    kvm_info = expect_object(kvm, "query-kvm")
    enabled = expect_bool(kvm_info.get("enabled"), "enabled of query-kvm")
    ranges = parse_mtree(expect_str(mtree, "info mtree"))
    if len(ranges) > MAX_RANGES:
        raise LayoutError(f"the guest's memory has {len(ranges)} ranges")
    blocks = parse_ramblocks(expect_str(ramblock, "info ramblock"))
    memdevs = parse_memdevs(memdev)
    memory_devices = parse_memory_devices(devices)
    nodes = parse_numa(expect_str(numa, "info numa"))

    mapped = await _host_addresses(monitor, ranges)
    if mapped is None:
        return None
    sections = build_sections(
        ranges,
        blocks,
        memdevs,
        memory_devices,
        mapped,
        kvm=enabled,
        node_of=memdev_nodes(ranges, memdevs, memory_devices, nodes),
    )
    return Machine(
        version=monitor.version,
        package=monitor.package,
        machine_type=_str_or_none(machine_type),
        status=expect_str(run.get("status"), "status of query-status"),
        running=expect_bool(run.get("running"), "running of query-status"),
        kvm=enabled,
        vcpus=_vcpus(cpus),
        ranges=ranges,
        ramblocks=blocks,
        sections=sections,
        memdevs=memdevs,
        memory_devices=memory_devices,
        numa=nodes,
        balloon=_balloon(balloon, summary, memory_devices),
        migration=_member(migrate, "status", "query-migrate"),
        dirty_rate=_member(dirty_rate, "status", "query-dirty-rate"),
    )


async def _all(*awaitables: Awaitable[object]) -> list[object]:
    """Await all; if one fails, leave none of the others running behind."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _optional(awaitable: Awaitable[object]) -> object | None:
    """Await a command that this QEMU may lack or refuse (no balloon, no such property)."""
    try:
        return await awaitable
    except CommandError:
        return None


async def _host_addresses(monitor: Monitor, ranges: Sequence[FlatRange]) -> dict[int, int] | None:
    """Return the host address of every range of RAM or ROM, or None if the map has changed.

    First and last page are asked for: memory that is one range for the guest must be one
    mapping in QEMU, or it is not what we think.
    """
    wanted = [r for r in ranges if r.kind in ("ram", "rom") and r.size >= _PAGE]
    questions = [gpa for r in wanted for gpa in (r.start, (r.end - 1) // _PAGE * _PAGE)]
    # QEMU queues at most 8 requests (QMP_REQ_QUEUE_LEN_MAX, monitor/qmp.c) and then stops
    # reading; more would only wait in the socket, but a slice bounds our own tasks.
    answers: list[object] = []
    for start in range(0, len(questions), 64):
        asked = questions[start : start + 64]
        answers += await _all(*(monitor.hmp(f"gpa2hva {gpa:#x}") for gpa in asked))
    if parse_mtree(await monitor.hmp("info mtree -f")) != tuple(ranges):
        return None
    found: dict[int, int] = {}
    for item, first, last in zip(wanted, answers[::2], answers[1::2], strict=True):
        (name, hva), (last_name, last_hva) = (
            parse_gpa2hva(expect_str(answer, "gpa2hva")) for answer in (first, last)
        )
        distance = (item.end - 1) // _PAGE * _PAGE - item.start
        if {name, last_name} != {item.name} or last_hva - hva != distance:
            raise LayoutError(
                f"memory {item.name!r} at {item.start:#x} is not one piece in QEMU",
                "the memory map may have changed and changed back: try again",
            )
        found[item.start] = hva
    return found


def _vcpus(value: object) -> tuple[Vcpu, ...]:
    vcpus = []
    for item in expect_array(value, "query-cpus-fast"):
        entry = expect_object(item, "an entry of query-cpus-fast")
        props = expect_object(entry.get("props", {}), "props of a vCPU")
        node = props.get("node-id")
        vcpus.append(
            Vcpu(
                index=expect_int(entry.get("cpu-index"), "cpu-index of a vCPU", 0, 1 << 20),
                # PID_MAX_LIMIT, include/linux/threads.h
                thread_id=expect_int(entry.get("thread-id"), "thread-id of a vCPU", 1, 1 << 22),
                qom_path=expect_str(entry.get("qom-path"), "qom-path of a vCPU"),
                node=None if node is None else expect_int(node, "node-id of a vCPU", 0, 1023),
            )
        )
    if not vcpus:
        raise MonitorError("QEMU says it has no vCPU", "check that the socket is QEMU's own")
    if len({vcpu.qom_path for vcpu in vcpus}) != len(vcpus):
        raise MonitorError("query-cpus-fast lists a vCPU twice", "check that the socket is QEMU's")
    return tuple(sorted(vcpus, key=lambda vcpu: vcpu.index))


def _balloon(
    answer: object | None, summary: object, devices: Sequence[MemoryDevice]
) -> Balloon | None:
    if answer is None:
        return None
    actual = expect_int(expect_object(answer, "query-balloon").get("actual"), "the balloon")
    base = expect_int(
        expect_object(summary, "query-memory-size-summary").get("base-memory"), "base-memory"
    )
    # What "actual" counts: boot memory and DIMMs, nothing else (get_current_ram_size(),
    # hw/virtio/virtio-balloon.c).
    return Balloon(actual, base + sum(d.size for d in devices if d.kind == "dimm"))


def _member(answer: object | None, key: str, what: str) -> str | None:
    if answer is None:
        return None
    value = expect_object(answer, what).get(key)
    return None if value is None else expect_str(value, f"{key} of {what}")


def _str_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


async def read_stage2(monitor: Monitor) -> Stage2 | None:
    """Return KVM's counts of stage-2 leaves; None if this QEMU or kernel does not give them.

    They are in ``query-stats`` since QEMU 7.1, if the kernel has KVM_CAP_BINARY_STATS_FD;
    KVM counts leaf SPTEs (``kvm_update_page_stats()``, arch/x86/kvm/mmu).

    :raises MonitorError: if the conversation fails.
    """
    names = ("pages_4k", "pages_2m", "pages_1g")
    answer = await _query_stats(monitor, "vm", names)
    if not answer:
        return None
    stats = _stats(answer[0])
    if not set(names) <= stats.keys():
        return None
    return Stage2(*(stats[name] for name in names))


async def read_vcpu_stats(monitor: Monitor, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return KVM's counters of each vCPU, by QOM path; empty if there are none.

    :param names: e.g. ``pf_taken``, ``pf_fixed``, ``exits``. Unknown ones are left out.
    :raises MonitorError: if the conversation fails.
    """
    found = {}
    for item in await _query_stats(monitor, "vcpu", names):
        entry = expect_object(item, "an entry of query-stats")
        found[expect_str(entry.get("qom-path"), "qom-path of query-stats")] = _stats(entry)
    return found


async def _query_stats(monitor: Monitor, target: str, names: Sequence[str]) -> Sequence[object]:
    """Return the entries of ``query-stats`` of provider kvm; empty if it cannot be asked."""
    providers = [{"provider": "kvm", "names": list(names)}]
    try:
        answer = await monitor.execute("query-stats", target=target, providers=providers)
    except CommandError:
        return ()
    return [
        item
        for item in expect_array(answer, "query-stats")
        if expect_object(item, "an entry of query-stats").get("provider") == "kvm"
    ]


def _stats(item: object) -> dict[str, int]:
    entry = expect_object(item, "an entry of query-stats")
    values = {}
    for stat in expect_array(entry.get("stats"), "stats of query-stats"):
        pair = expect_object(stat, "a value of query-stats")
        name, value = expect_str(pair.get("name"), "a name of query-stats"), pair.get("value")
        if isinstance(value, bool):
            values[name] = int(value)
        elif isinstance(value, int):  # others are histograms
            values[name] = expect_int(value, f"{name[:40]} of query-stats")
    return values
