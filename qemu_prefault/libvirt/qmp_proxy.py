# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP server in front of libvirt's own connection to QEMU: what ``--domain`` talks to.

libvirt owns the monitor of its QEMUs, and passes commands and events on for others
(virDomainQemuMonitorCommand(), which taints the domain "custom-monitor"). All else here
speaks QMP over a socket. So a process of its own stands between: it outlives a tool that is
killed while it has the guest paused, and the guard's ``cont`` (see engine/resume_guard.py)
still arrives. It ends when the last of those who hold the other end of its socket is gone.

A libvirtd that is restarted meanwhile does not end it: the connection is made anew, and the
command sent once more. Those of ours may be: queries, ``stop`` and ``cont``.

A domain that is migrating in is libvirt's alone until it is here: whoever comes earlier waits.
"""

from __future__ import annotations

import asyncio
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
from ..units import printable
from .connection import connect, default_uri, lookup, module

#: Seconds for a daemon that is being restarted to come back.
PATIENCE: Final = 30.0
#: Seconds for the proxy to say something: libvirt gives up on a busy domain after 30
#: (QEMU_JOB_WAIT_TIME, src/qemu/qemu_domain.c).
ANSWER_SECONDS: Final = 60.0
LONGEST_MESSAGE: Final = 16 << 20


# -- the tool's side ---------------------------------------------------------------------


def connect_vm(domain: str, pid: int | None = None) -> AbstractAsyncContextManager[Vm]:
    """:class:`Vm` of a domain that runs here, by libvirt's own connection to its QEMU.

    :param domain: its name or UUID. :param pid: of its QEMU, where that is known.
    :raise QemuPrefaultError: see :func:`dial`, and :meth:`Vm.connect`.
    """
    return Vm.connect(f"libvirt:{domain}", pid, partial(dial, domain))


async def dial(domain: str) -> tuple[socket.socket, str]:
    """A socket on which the domain's QEMU is about to greet, and the domain's UUID.

    It takes as long as a domain that is migrating in does, else at most a minute.

    :raise QemuPrefaultError: there is no such domain, it does not run, or libvirt is not there.
    """
    import subprocess  # noqa: PLC0415

    module()
    ours, theirs = socket.socketpair()
    with theirs:
        words = [sys.executable, "-P", "-m", __name__, default_uri(), domain]
        child = subprocess.Popen(words, stdin=theirs.fileno(), start_new_session=True)
    child.returncode = 0  # it ends after us
    ours.setblocking(False)
    try:
        answer: dict[str, Any] = {"waiting": True}
        while "waiting" in answer:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = json.loads(await _line(ours))
    except (OSError, ValueError):
        ours.close()
        raise FailedError(
            f"the process that speaks to libvirt for domain {domain} did not start",
            "see its message above",
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
    # A byte at a time: what follows is for QMP.
    line = b""
    while not line.endswith(b"\n"):
        byte = await asyncio.get_running_loop().sock_recv(sock, 1)
        if not byte:
            raise ConnectionResetError
        line += byte
    return line


# -- the proxy ---------------------------------------------------------------------------


class QmpProxy:
    """One domain, one client."""

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
        self._name = self._domain.UUIDString()  # the same one ever after
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
                os._exit(0)  # nobody is there any more

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have QEMU execute it, by libvirt; libvirt's own errors look like QEMU's."""
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
        """Whether it is the connection that has failed, and not the command."""
        try:
            return not self._connection.isAlive()
        except self._libvirt.libvirtError:
            return True

    def _is_arriving(self) -> bool:
        """Whether the domain is still on its way to this host."""
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
        """Say that we are there, and then what QEMU says to a new client.

        :raise QemuPrefaultError: it cannot be spoken to.
        """
        told = False
        while "return" not in (answer := self.command({"execute": "query-version"})):
            if not (self._busy and self._is_arriving()):
                raise FailedError(
                    f"domain {self._domain.name()}: {answer['error']['desc']}",
                    "does it run, and under QEMU? virsh domstate DOMAIN",
                    code=Code.LIBVIRT,
                )
            if not told:
                text = f"domain {self._domain.name()} is migrating in: waiting until it is here"
                print(printable(text), file=sys.stderr)
                told = True
            self._send({"waiting": True})
        self._send({"uuid": self._name})
        version = {key: answer["return"][key] for key in ("qemu", "package")}
        self._send({"QMP": {"version": version, "capabilities": []}})
        self._greeted = True

    def serve(self) -> None:
        """Answer until the client is gone."""
        decoder = json.JSONDecoder()
        buffer = b""
        while data := self._client.recv(1 << 16):
            buffer += data
            while True:
                # 0xff makes QEMU's parser start afresh: what came before it does not count.
                buffer = buffer.rpartition(b"\xff")[2].lstrip()
                try:
                    request, end = decoder.raw_decode(buffer.decode(errors="replace"))
                except ValueError:
                    if len(buffer) > LONGEST_MESSAGE:
                        return
                    break  # the rest of it is yet to come
                buffer = buffer.decode(errors="replace")[end:].encode()
                if not isinstance(request, dict):
                    self._send(_refusal("a request is a JSON object"))
                elif request.get("execute") == "qmp_capabilities":
                    identity = {"id": request["id"]} if "id" in request else {}
                    self._send({"return": {}} | identity)
                else:
                    self._send(self.command(request))


def _refusal(what: str) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": what}}


def main(uri: str, domain: str) -> None:
    """Serve on stdin, which is a socket."""
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
