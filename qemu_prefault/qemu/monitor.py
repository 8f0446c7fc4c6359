# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP connection to QEMU, with its commands and events.

This module handles cases that ``qemu.qmp`` does not handle:

* **A QMP socket serves one client at a time.** While QEMU serves a client, it does not accept other
  connections (chardev/char-socket.c), and they stay in the kernel's backlog. The connect() of a
  second client succeeds, but QEMU sends no greeting to this client. In this case,
  :meth:`Monitor.connect` raises :class:`MonitorBusyError` within two seconds (see dial.py). Usually
  ``/proc/net/unix`` shows immediately that QEMU has accepted another client and not this process.
* **A client must send nothing before the greeting.** If a client in the backlog sent a command,
  QEMU would execute the command when it accepts the connection. By then, the client may have
  disconnected.
* **The peer may be any program.** Examples are a guest agent, a human monitor, a proxy, and a
  program that sends large amounts of other data. Replies have a maximum length, and every wait has
  a time limit. Every failure raises a :class:`~qemu_prefault.errors.QemuPrefaultError` with a
  remedy.
* **QEMU may exit during a command.** If QEMU exits, the event streams of ``qemu.qmp`` do not end,
  but those of :mod:`~qemu_prefault.qemu.events` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final

from qemu.qmp import (
    ConnectError,
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
from ..host.peer import Peer
from .dial import (
    REMEDY_SILENT,
    Dial,
    await_greeting,
    brief,
    closed_early,
    connect,
    has_closed,
    not_qmp,
)
from .events import EventDispatcher, EventStream
from .message_limits import (
    MAX_EVENT,
    MAX_EVENT_VALUES,
    MAX_REPLY,
    ReplyBudget,
    count_values,
)
from .qapi import expect_int, expect_object, expect_str

#: The default time limit for a reply in seconds: of a QEMU behind a UNIX socket, and of one that is
#: behind libvirt or a TCP socket or loads a guest. libvirt can itself wait for 30 seconds.
LOCAL_SECONDS: Final = 7.0
PATIENT_SECONDS: Final = 30.0
#: The time limit in seconds after QEMU has not replied to a command in time.
SECONDS_AFTER_TIMEOUT: Final = 0.5


class _Client(QMPClient):
    """A QMPClient that limits messages, and does not format every message for the debug log.

    Formatting takes most of the time and memory that a large reply needs. In qemu.qmp, the
    ``_cb_`` methods that this class overrides log each message.

    :ivar budget: The limit on the replies to all pending commands together.
    :ivar cause: The exception that closed the connection, or None. ``disconnect()`` should raise
        this exception. However, if commands are pending, it may raise an AssertionError instead
        (qemu.qmp 0.0.6).
    """

    cause: Exception | None = None

    def __init__(self) -> None:
        super().__init__(readbuflen=MAX_REPLY)
        self.budget = ReplyBudget()

    async def _do_recv(self) -> Message:
        while True:
            line = await self._readline()
            values = count_values(line)
            small = len(line) <= MAX_EVENT and values <= MAX_EVENT_VALUES
            if not small:
                self.budget.spend(line, values)
            message = Message(line, eager=True)
            if small or "event" not in message:
                return message

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
    """An established QMP session, which :meth:`connect` creates.

    :ivar address: The address that the user specified.
    :ivar version: QEMU's version, e.g. ``10.0.13``.
    :ivar package: The distributor's suffix of the version, e.g. ``Debian 1:10.0.13+ds-0+deb13u1``,
        or an empty string.
    :ivar peer: The process that called listen() on the socket, or None as for :attr:`peer_pid`.
    :ivar negotiation_seconds: The duration of QEMU's greeting and of the capabilities negotiation.
    :ivar vm_uuid: The VM's UUID as ``dial`` returned it, or None if the address is a socket.
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
        self.peer: Peer | None = None
        self._client = client
        self._sock = sock
        self.negotiation_seconds = 0.0
        self._late = False
        self._dispatcher = EventDispatcher()
        client.register_listener(self._dispatcher)
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        address: str,
        *,
        connect_timeout: float = 5.0,
        command_timeout: float | None = None,
        dial: Dial | None = None,
    ) -> AsyncIterator[Monitor]:
        """Connect to QEMU's QMP socket, and disconnect at the end of the block.

        :param address: The path of a UNIX socket, ``unix:PATH``, ``HOST:PORT`` or
            ``tcp:HOST:PORT``.
        :param connect_timeout: The time limit for establishing the session, in seconds. If QEMU
            accepts the connection but sends no greeting, the method fails after at most
            :data:`GREETING_TIMEOUT` seconds.
        :param command_timeout: The default time limit for each command, in seconds. None means
            :data:`LOCAL_SECONDS` or :data:`PATIENT_SECONDS`.
        :param dial: A function that opens the connection. ``connect_timeout`` starts when this
            function returns. If ``dial`` is not None, ``address`` is only the name of the
            connection in messages.
        :raises InputError: If the address is malformed, or if the socket or the host does not
            exist.
        :raises MonitorBusyError: If QEMU serves another client.
        :raises MonitorError: If no QMP session can be established for another reason.
        """
        monitor = await cls._open(address, connect_timeout, command_timeout, dial)
        try:
            yield monitor
        finally:
            await monitor.close()

    @classmethod
    async def _open(
        cls, address: str, timeout: float, command_timeout: float | None, dial: Dial | None
    ) -> Monitor:
        deadline = asyncio.get_running_loop().time() + timeout
        uuid = None
        if dial is None:
            sock = await connect(address, deadline)
        else:
            sock, uuid = await dial()
            deadline = asyncio.get_running_loop().time() + timeout
        # The peer of a connection made by ``dial`` may be a helper process of this process.
        peer = None if uuid else Peer.of(sock)
        client = _Client()
        client.events.names = {""}  # otherwise the built-in listener keeps every event
        try:
            started = time.monotonic()
            await await_greeting(sock, address, deadline)
            await _negotiate(client, sock, address, deadline)
            if command_timeout is None:
                command_timeout = PATIENT_SECONDS if peer is None else LOCAL_SECONDS
            monitor = cls(client, sock, address, command_timeout, uuid)
            monitor.peer = peer
            monitor.negotiation_seconds = time.monotonic() - started
            return monitor
        except BaseException:
            await _hang_up(client, sock)
            raise

    @property
    def peer_pid(self) -> int | None:
        """The pid of the process that called listen() on the socket (SO_PEERCRED).

        The pid is None if the socket is a TCP socket, if ``dial`` made the connection, or if the
        process is outside this pid namespace.
        """
        return None if self.peer is None else self.peer.pid

    @property
    def is_local(self) -> bool:
        """Whether QEMU is behind a UNIX socket, and not behind libvirt or a network."""
        return self.peer is not None

    async def close(self) -> None:
        """Disconnect from QEMU. If this was already done, the method does nothing."""
        self.peer = None  # closes the peer's descriptor
        self._watcher.cancel()
        await _hang_up(self._client, self._sock)
        self._end_streams()

    async def _watch(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        self._end_streams()

    def _end_streams(self) -> None:
        for stream in self._dispatcher.streams:
            stream.end()

    @property
    def alive(self) -> bool:
        """Whether the QMP session is still connected."""
        return self._client.runstate == Runstate.RUNNING

    def fileno(self) -> int:
        """Return the file descriptor of the QMP socket.

        While a copy of the descriptor is open, QEMU serves no other client. Do not read from the
        descriptor or write to it while this object is in use.
        """
        return self._sock.fileno()

    async def execute(
        self, command: str, /, *, timeout: float | None = None, **arguments: object
    ) -> object:
        """Execute a QMP command, and return its decoded reply.

        Concurrent calls are pipelined. QEMU replies to them in order.

        :param timeout: The time limit in seconds, or None for ``command_timeout``.
        :param arguments: The command's arguments. Their names contain underscores instead of
            dashes, for example ``command_line``.
        :raises CommandError: If QEMU refuses the command.
        :raises MonitorError: If the connection is closed, or if QEMU does not reply within the time
            limit.
        """
        args = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.execute_raw(command, args, timeout=timeout)

    async def execute_raw(
        self, command: str, arguments: Mapping[str, object], *, timeout: float | None = None
    ) -> object:
        """Execute a command like :meth:`execute`, with QMP's own argument names."""
        limit = self.command_timeout if timeout is None else timeout
        if self._late:
            limit = min(limit, SECONDS_AFTER_TIMEOUT)
        try:
            # Do not use wait_for(): before Python 3.12, it loses a cancellation that arrives
            # together with the reply, and the cancelled task continues.
            async with asyncio.timeout(limit):
                with self._client.budget:
                    reply = await self._client.execute(command, dict(arguments) or None)
            self._late = False
            return reply
        except TimeoutError as error:
            self._late = True
            raise MonitorError(
                f"QEMU did not reply to {command} within {limit:g} s",
                "check whether QEMU is stopped or its main loop is blocked\n"
                "QEMU may still execute the command later",
                code=Code.MONITOR_TIMEOUT,
            ) from error
        except ExecuteError as error:
            self._late = False
            raise CommandError(command, error.error_class, str(error)) from error
        except (ExecInterruptedError, StateError) as error:
            raise self._dead(command) from error
        except (QMPError, OSError, ValueError, KeyError) as error:
            # BadReplyError and similar. qemu.qmp raises KeyError if a reply is sent twice.
            raise not_qmp(self.address, f"the reply to {command} is malformed") from error

    @contextlib.contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Set the default time limit of each command within the ``with`` block.

        :param seconds: The time limit in seconds.
        """
        before, self.command_timeout = self.command_timeout, seconds
        try:
            yield
        finally:
            self.command_timeout = before

    async def hmp(self, line: str, *, timeout: float | None = None) -> str:
        """Execute a human monitor command, and return its output.

        The human monitor reports its own errors only in this output.

        :param timeout: The time limit in seconds, or None for ``command_timeout``.
        :raises MonitorError: If :meth:`execute` raises this error.
        """
        answer = await self.execute("human-monitor-command", command_line=line, timeout=timeout)
        return expect_str(answer, f'the reply to "{line}"')

    def _dead(self, command: str) -> MonitorError:
        """Return the error for a connection that was closed during ``command``."""
        cause = self._client.cause
        if cause is None or has_closed(cause):
            return MonitorError(
                f"QEMU closed the QMP connection {self.address} during {command}",
                "check whether QEMU is still running, and whether the command has taken effect",
                code=Code.MONITOR_CLOSED,
            )
        return not_qmp(self.address, f"during {command} it sent {brief(cause)}")

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        """Subscribe to the named events within the ``with`` block.

        If ``names`` is empty, the stream contains all events.
        """
        stream = EventStream(names)
        if not self.alive:
            stream.end()
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
    except Exception as error:  # qemu.qmp wraps every exception that a peer can cause
        inner = error.exc if isinstance(error, ConnectError) else error
        if has_closed(inner):
            raise closed_early(address) from error
        raise not_qmp(address, brief(error)) from error


async def _hang_up(client: _Client, sock: socket.socket) -> None:
    # disconnect() first flushes its output, which the peer may never read, and then raises the
    # exception that closed the connection (EOFError, OSError, …). Both are irrelevant now.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(1.0):
            await client.disconnect()
    sock.close()


def _version(greeting: object) -> tuple[str, str]:
    """Return QEMU's version and package version from the QMP greeting."""
    qmp = getattr(greeting, "QMP", None)
    version = expect_object(getattr(qmp, "version", None), "the version in the QMP greeting")
    qemu = expect_object(version.get("qemu"), "the version in the QMP greeting")
    parts = [
        expect_int(qemu.get(k), "QEMU's version", 0, 9999) for k in ("major", "minor", "micro")
    ]
    package = expect_str(version.get("package", ""), "QEMU's package version")
    return ".".join(map(str, parts)), package[:200]
