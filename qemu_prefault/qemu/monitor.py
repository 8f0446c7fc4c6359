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
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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

from ..errors import (
    Code,
    CommandError,
    MonitorError,
)
from .dial import (
    MAX_REPLY,
    REMEDY_SILENT,
    Dial,
    await_greeting,
    brief,
    closed_early,
    connect,
    not_qmp,
)
from .qapi import expect_int, expect_object, expect_str

#: Events kept for a reader that does not read; the oldest are dropped.
MAX_EVENTS: Final = 1024


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
        this pid namespace sees it; None for TCP, for what was dialled, and for a process
        outside the namespace.
    :ivar vm_uuid: of the VM, as the one who dialled knows it; None if it was a socket.
    """

    def __init__(
        self,
        client: _Client,
        sock: socket.socket,
        address: str,
        command_timeout: float,
        vm_uuid: str | None = None,
    ) -> None:
        self.address = address
        self.vm_uuid = vm_uuid
        self.command_timeout = command_timeout
        self.version, self.package = _version(client.greeting)
        # At the other end of what was dialled may be a process of our own.
        self.peer_pid = None if vm_uuid else _peer_pid(sock)
        self._client = client
        self._sock = sock
        self._dispatcher = _Dispatcher()
        client.register_listener(self._dispatcher)
        self._watcher = asyncio.create_task(self._watch())

    # --- life ---

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        address: str,
        *,
        connect_timeout: float = 5.0,
        command_timeout: float = 30.0,
        dial: Dial | None = None,
    ) -> AsyncIterator[Monitor]:
        """Connect to QEMU's QMP socket, negotiate, and disconnect when the block is left.

        :param address: path of a UNIX socket (``unix:PATH`` too), or ``HOST:PORT``
            (``tcp:HOST:PORT`` too).
        :param connect_timeout: seconds for everything up to an established session. A socket
            that does not greet is given up after at most :data:`GREETING_TIMEOUT`.
        :param command_timeout: seconds each command may take, unless the call says otherwise.
        :param dial: makes the connection instead, however long that takes; ``address`` is only
            its name in messages then.
        :raises InputError: if the address is none, or names nothing.
        :raises MonitorBusyError: if another client is being served.
        :raises MonitorError: if there is no QMP to be had, for the reason given.
        """
        monitor = await cls._open(address, connect_timeout, command_timeout, dial)
        try:
            yield monitor
        finally:
            await monitor._close()

    @classmethod
    async def _open(
        cls, address: str, timeout: float, command_timeout: float, dial: Dial | None
    ) -> Monitor:
        deadline = asyncio.get_running_loop().time() + timeout
        uuid = None
        if dial is None:
            sock = await connect(address, deadline)
        else:
            sock, uuid = await dial()
            deadline = asyncio.get_running_loop().time() + timeout
        client = _Client(readbuflen=MAX_REPLY)
        client.events.names = {""}  # the built-in listener would keep every event for ever
        try:
            await await_greeting(sock, address, deadline)
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
                code=Code.MONITOR_TIMEOUT,
            ) from error
        except ExecuteError as error:
            raise CommandError(command, error.error_class, str(error)) from error
        except (ExecInterruptedError, StateError) as error:
            raise self._dead(command) from error
        except (QMPError, OSError, ValueError, KeyError) as error:
            # BadReplyError and its like; KeyError comes from qemu.qmp when a reply is sent twice
            raise not_qmp(self.address, f"its answer to {command} is malformed") from error

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
                code=Code.MONITOR_CLOSED,
            )
        return not_qmp(self.address, f"during {command} it sent {brief(cause)}")

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


async def _negotiate(client: _Client, sock: socket.socket, address: str, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(max(loop.time() + 0.1, deadline)):
            await client.connect(sock)
    except TimeoutError as error:
        raise MonitorError(
            f"{address} did not finish the QMP greeting", REMEDY_SILENT, code=Code.MONITOR_SILENT
        ) from error
    except Exception as error:  # qemu.qmp wraps anything that a peer can provoke
        inner = error.exc if isinstance(error, ConnectError) else error
        if isinstance(inner, (EOFError, OSError)):
            raise closed_early(address) from error
        raise not_qmp(address, brief(error)) from error


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
