# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP server that forwards commands through libvirt, for ``--domain``.

libvirt owns the monitors of its QEMU processes, and forwards commands and events for other
programs. A command that a program passes to virDomainQemuMonitorCommand() taints the domain as
"custom-monitor". The rest of this package uses QMP over a socket. The proxy is a separate process,
which translates between QMP and libvirt's API. If qemu-prefault is killed while the guest is
paused, the proxy still forwards the ``cont`` that the resume guard (engine/resume_guard.py) sends.
The proxy exits when every process has closed the other end of its socket.

If libvirtd restarts, the proxy reconnects and sends the command again. Sending a command twice is
safe, because this package sends only queries, ``stop`` and ``cont``.

While a domain is migrating to this host, libvirt accepts no QMP commands for the domain. The proxy
waits until the migration has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final

from ..engine.vm import Vm
from ..errors import Code, FailedError, InputError, QemuPrefaultError
from ..logs import escape_unhandled_records
from ..text import install_hooks, write
from .connection import connect, default_uri, lookup, module

#: Seconds to wait for a daemon that is being restarted.
PATIENCE: Final = 30.0
#: Seconds to wait for a message from the proxy. If a domain is busy, libvirt fails the command
#: after 30 seconds (QEMU_JOB_WAIT_TIME, src/qemu/qemu_domain.c).
ANSWER_SECONDS: Final = 60.0
#: Maximum size of a request, in bytes.
LONGEST_MESSAGE: Final = 16 << 20


# --- client ---


def connect_vm(domain: str, pid: int | None = None) -> AbstractAsyncContextManager[Vm]:
    """Return a context manager that connects to a domain's QEMU through libvirt.

    :param domain: The name or UUID of a domain on this host.
    :param pid: QEMU's process id, or None if unknown.
    :returns: An asynchronous context manager that yields a :class:`Vm`.
    :raises QemuPrefaultError: If :func:`dial` or :meth:`Vm.connect` raises an error.
    """
    return Vm.connect(f"libvirt:{domain}", pid, partial(dial, domain))


async def dial(domain: str) -> tuple[socket.socket, str]:
    """Start a proxy, and return its socket and the domain's UUID.

    The next message on the socket is QEMU's QMP greeting. If the domain is migrating to this host,
    the function waits until the migration has completed. Otherwise the function takes at most a
    minute.

    :raises QemuPrefaultError: If the domain does not exist or does not run, or if libvirt does not
        respond.
    """
    import subprocess  # noqa: PLC0415

    module()
    ours, theirs = socket.socketpair()
    with theirs:
        # This process may ignore PYTHONPATH (program_words()). Then the proxy ignores it too.
        isolated = ["-E"] if sys.flags.ignore_environment else []
        words = [sys.executable, *isolated, "-P", "-m", __name__, default_uri(), domain]
        child = subprocess.Popen(words, stdin=theirs.fileno(), start_new_session=True)
    child.returncode = 0  # prevents a warning from Popen: the proxy outlives this process
    ours.setblocking(False)
    try:
        answer: dict[str, Any] = {"waiting": True}
        while "waiting" in answer:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = json.loads(await _line(ours))
    except (OSError, ValueError):
        ours.close()
        raise FailedError(
            f"the QMP proxy for domain {domain} exited, or sent no message for "
            f"{ANSWER_SECONDS:.0f} seconds",
            "check that libvirt responds: virsh list. If the proxy printed an error, see it above",
            code=Code.LIBVIRT,
        ) from None
    except BaseException:
        ours.close()
        raise
    if "error" in answer:
        ours.close()
        kind = InputError if answer["usage"] else FailedError
        raise kind(answer["error"], answer["remedy"], code=answer["code"])
    return ours, answer["uuid"]


async def _line(sock: socket.socket) -> bytes:
    # Read single bytes, because the data after the line belongs to the QMP connection.
    line = b""
    while not line.endswith(b"\n"):
        byte = await asyncio.get_running_loop().sock_recv(sock, 1)
        if not byte:
            raise ConnectionResetError
        line += byte
    return line


# --- server ---


class QmpProxy:
    """A QMP server for one domain and one client."""

    def __init__(self, uri: str, domain: str, client: socket.socket) -> None:
        self._uri = uri
        self._name = domain
        self._client = client
        self._writing = threading.Lock()
        self._greeted = False
        self._busy = False
        self._libvirt = module()
        self._libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._run_events, daemon=True).start()
        self._connect()

    def _connect(self) -> None:
        import libvirt_qemu  # noqa: PLC0415

        self._qemu = libvirt_qemu
        self._connection = connect(self._uri)
        self._connection.setKeepAlive(5, 6)
        self._domain = lookup(self._connection, self._name)
        self._name = self._domain.UUIDString()  # the name may be reused for another domain
        libvirt_qemu.qemuMonitorEventRegister(
            self._connection, self._domain, None, self._on_event, None
        )

    def _run_events(self) -> None:
        while True:
            self._libvirt.virEventRunDefaultImpl()

    def _on_event(
        self, _conn: Any, _dom: Any, name: str, seconds: int, micros: int, details: str, _: Any
    ) -> None:
        if not self._greeted:
            return
        stamp = {"seconds": seconds, "microseconds": micros}
        message: dict[str, Any] = {"event": name, "timestamp": stamp}
        if details:
            message["data"] = json.loads(details)
        self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\r\n"
        with self._writing:
            try:
                self._client.sendall(data)
            except OSError:
                os._exit(0)  # every process has closed the other end

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Execute a command, and convert libvirt's errors to QMP errors."""
        identity = {"id": request["id"]} if "id" in request else {}
        text = json.dumps({k: v for k, v in request.items() if k != "id"})
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                answer = json.loads(self._qemu.qemuMonitorCommand(self._domain, text, 0))
            except self._libvirt.libvirtError as error:
                self._busy = error.get_error_code() == self._libvirt.VIR_ERR_OPERATION_TIMEOUT
                if not self._is_lost(error) or time.monotonic() > deadline:
                    what = error.get_error_message() or str(error)
                    return _refusal(f"libvirt: {what}") | identity
                self._reconnect(deadline)
                continue
            answer.pop("id", None)
            return answer | identity  # type: ignore[no-any-return]

    def _is_lost(self, error: Any) -> bool:
        """Return whether a command failed because the connection to libvirt is lost."""
        try:
            return not self._connection.isAlive()
        except self._libvirt.libvirtError:
            return True

    def _is_arriving(self) -> bool:
        """Return whether the domain is still migrating to this host."""
        arriving = [self._libvirt.VIR_DOMAIN_PAUSED, self._libvirt.VIR_DOMAIN_PAUSED_MIGRATION]
        try:
            return bool(self._domain.state() == arriving)
        except self._libvirt.libvirtError:
            return False

    def _reconnect(self, deadline: float) -> None:
        while True:
            try:
                self._connect()
                return
            except (QemuPrefaultError, self._libvirt.libvirtError):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)

    def greet(self) -> None:
        """Send the domain's UUID, and then a QMP greeting.

        :raises QemuPrefaultError: If libvirt cannot execute QMP commands in this domain.
        """
        told = False
        while "return" not in (answer := self.command({"execute": "query-version"})):
            if not (self._busy and self._is_arriving()):
                raise FailedError(
                    f"domain {self._domain.name()}: {answer['error']['desc']}",
                    "check that the domain is running: virsh domstate DOMAIN",
                    code=Code.LIBVIRT,
                )
            if not told:
                name = self._domain.name()
                text = f"domain {name} is migrating in; waiting until the migration ends"
                with contextlib.suppress(OSError):
                    write(text, sys.stderr)
                told = True
            self._send({"waiting": True})
        self._send({"uuid": self._name})
        version = {key: answer["return"][key] for key in ("qemu", "package")}
        self._send({"QMP": {"version": version, "capabilities": []}})
        self._greeted = True

    def serve(self) -> None:
        """Reply to requests until the client closes the connection."""
        decoder = json.JSONDecoder()
        buffer = b""
        while data := self._client.recv(1 << 16):
            buffer += data
            while True:
                # Discard everything before a 0xff byte, as QEMU's parser does.
                buffer = buffer.rpartition(b"\xff")[2].lstrip()
                try:
                    request, end = decoder.raw_decode(buffer.decode(errors="replace"))
                except ValueError:
                    if len(buffer) > LONGEST_MESSAGE:
                        return
                    break  # the request is incomplete
                buffer = buffer.decode(errors="replace")[end:].encode()
                if not isinstance(request, dict):
                    self._send(_refusal("a request must be a JSON object"))
                elif request.get("execute") == "qmp_capabilities":
                    identity = {"id": request["id"]} if "id" in request else {}
                    self._send({"return": {}} | identity)
                else:
                    self._send(self.command(request))


def _refusal(what: str) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": what}}


def main(uri: str, domain: str) -> None:
    """Serve QMP on stdin, which is a socket."""
    install_hooks()
    escape_unhandled_records()
    client = socket.socket(fileno=os.dup(0))
    try:
        proxy = QmpProxy(uri, domain, client)
        proxy.greet()
    except QemuPrefaultError as error:
        told = {
            "error": error.cause,
            "remedy": error.remedy,
            "code": error.code,
            "usage": isinstance(error, InputError),
        }
        client.sendall(json.dumps(told).encode() + b"\n")
        return
    proxy.serve()


if __name__ == "__main__":
    main(*sys.argv[1:3])
