# SPDX-License-Identifier: GPL-2.0-or-later
"""Serve a WSGI application over HTTP, with limits on connections, threads and time.

Every user of the host can connect to the listener. The server handles all connections in one
thread, so that idle connections cost no threads. If too many connections are open, the server
closes the oldest one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ..errors import FailedError, InputError
from .events import log
from .sampler import describe_error

#: Maximum number of open connections.
CONNECTIONS: Final = 128
#: Maximum number of requests that are processed at once, each in a thread.
REQUESTS: Final = 4
#: Maximum time for receiving a request, in seconds.
REQUEST_SECONDS: Final = 5.0
#: Maximum time for sending a response, in seconds.
RESPONSE_SECONDS: Final = 10.0
#: Maximum size of a request, in bytes.
LONGEST_REQUEST: Final = 16 << 10
#: The address if the user specifies only a port.
DEFAULT_ADDRESS: Final = "127.0.0.1"
#: Seconds until the server listens again after an unexpected error.
RESTART_SECONDS: Final = 1.0

#: A WSGI application (PEP 3333).
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and the port of ``ADDRESS:PORT``.

    An empty ADDRESS is :data:`DEFAULT_ADDRESS`, so that only an explicit address makes the daemon
    reachable from other hosts.

    :raises InputError: If the text has another format.
    """
    host, colon, port = text.rpartition(":")
    valid = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
    if (text and not colon) or not valid:
        raise InputError(f"{text!r} is not ADDRESS:PORT", "write e.g. 127.0.0.1:9469")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host or DEFAULT_ADDRESS, int(port)


def bind(address: str) -> socket.socket:
    """Return a socket that listens on ``ADDRESS:PORT``.

    :raises InputError: If the address is malformed.
    :raises FailedError: If the process cannot listen on the address.
    """
    host, port = parse_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, UnicodeError) as error:  # UnicodeError: the name is not valid IDNA
        reason = getattr(error, "strerror", None) or str(error)
        raise FailedError(
            f"cannot listen on {address}: {reason}",
            f"to find the program that uses the port, run: ss -ltnp sport = {port}",
        ) from error
    bound = ipaddress.ip_address(listener.getsockname()[0])
    if bound.is_unspecified and host not in ("0.0.0.0", "::"):  # nosec B104
        listener.close()
        raise InputError(
            f"{address!r} means all addresses of this host",
            "to listen on all addresses, write 0.0.0.0:PORT or [::]:PORT",
        )
    return listener


def serve(listener: socket.socket, app: App) -> None:
    """Start a thread that serves ``app`` until the process exits."""
    threading.Thread(target=_serve_permanently, args=(listener, app), daemon=True).start()


def _serve_permanently(listener: socket.socket, app: App) -> None:
    problems = _Problems()
    while True:
        try:
            asyncio.run(_Server(listener, app, problems).run())
        except Exception as error:
            problems.log(describe_error(error))
        time.sleep(RESTART_SECONDS)


class _Problems:
    """Logs each problem once, so that a client cannot fill the log."""

    def __init__(self) -> None:
        self._last = ""

    def log(self, text: str) -> None:
        if text != self._last:
            self._last = text
            log.warning("serving metrics: %s", text)


class _Server:
    def __init__(self, listener: socket.socket, app: App, problems: _Problems) -> None:
        self._listener = listener
        self._app = app
        self._problems = problems
        self._workers = ThreadPoolExecutor(REQUESTS, "metrics")
        self._connections = 0
        #: Tasks that wait for their client, from the oldest to the newest.
        self._idle: dict[asyncio.Task[None], None] = {}

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: self._problems.log(str(context.get("message")))
        )
        try:
            server = await asyncio.start_server(
                self._accepted, sock=self._listener.dup(), limit=LONGEST_REQUEST
            )
            await server.serve_forever()
        finally:
            self._workers.shutdown(wait=False, cancel_futures=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= CONNECTIONS and not self._close_oldest():
            writer.transport.abort()
            return
        self._connections += 1
        task = asyncio.get_running_loop().create_task(self._handle(reader, writer))
        self._idle[task] = None
        task.add_done_callback(self._ended)

    def _close_oldest(self) -> bool:
        """Close the connection whose client has been idle for the longest time."""
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        oldest.cancel()
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections -= 1
        self._idle.pop(task, None)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            del self._idle[task]
            answer = await asyncio.get_running_loop().run_in_executor(
                self._workers, self._answer, head
            )
            self._idle[task] = None
            writer.write(answer)
            async with asyncio.timeout(RESPONSE_SECONDS):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client sent no request, or did not read the response
        finally:
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        """Return the HTTP response to a request.

        :param head: The request line and the headers.
        """
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response("400 Bad Request", [])
        if words[0] not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
        path, _, query = words[1].partition("?")
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            if name.lower() in ("accept", "accept-encoding"):
                environ[f"HTTP_{name.upper().replace('-', '_')}"] = value.strip()
        status: list[Any] = ["500 Internal Server Error", []]

        def start_response(text: str, headers: list[tuple[str, str]], _error: Any = None) -> None:
            status[:] = [text, headers]

        try:
            body = b"".join(self._app(environ, start_response))
        except Exception as error:
            self._problems.log(describe_error(error))
            return _response("500 Internal Server Error", [])
        return _response(status[0], status[1], body, with_body=words[0] == "GET")


def _response(
    status: str, headers: Iterable[tuple[str, str]], body: bytes = b"", *, with_body: bool = True
) -> bytes:
    fields = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + (body if with_body else b"")
