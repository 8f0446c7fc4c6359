# SPDX-License-Identifier: GPL-2.0-or-later
"""L0's connection to a running L1.

The connection consists of the QEMU process, its console, and the command server's port. One thread
handles all three, and also starts QEMU. If the test run ends, the kernel kills QEMU with the
parent-death signal. The kernel sends this signal when the thread that forked QEMU exits. L1 is lost
if QEMU exits, if the console shows a kernel failure, or if the command server's heartbeats stop.
All requests then fail immediately.

The thread also sends POKE to the command server twice a second. With Linux 7.2 and about twenty L2
guests, L1 can hang: L1's CPU is halted although interrupts are enabled and the timer interrupt is
pending in the local APIC. An interrupt from any device wakes the CPU. The likely cause is in TCG's
helper_vmrun() (target/i386/tcg/sysemu/svm_helper.c). This function sets CPU_INTERRUPT_VIRQ in the
vCPU's pending interrupts without holding the BQL. If another thread raises a timer interrupt at
the same time, the timer interrupt is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import command_server
from .errors import LabLostError

_FATAL = re.compile(
    rb"Kernel panic|\bBUG: |\bOops: |soft lockup|stack-protector|corrupted stack"
    rb"|general protection fault|lab-init: fatal"
)
_CONSOLE_BYTES = 1 << 20
_OUTGOING_LIMIT = 1 << 21
_TICK_SECONDS = 0.5
# Seconds to continue reading after a kernel failure, because the following lines show the reason.
_LAST_WORDS_SECONDS = 3.0


class Request:
    """A command in L1, with its request number and the frames for take()."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.frames: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()


class Channel:
    """An emulator's process and the connection to the command server in L1.

    :param argv: The emulator's command line. ``stdio`` is the console. The class replaces
        ``{port}`` and ``{monitor}`` with the file descriptors of the command server's socket and of
        the monitor's socket.
    :param heartbeat_limit: Seconds without a message from L1 after which L1 is considered lost.
    :param emulator: The emulator's name, for messages.
    """

    def __init__(
        self,
        argv: Sequence[str],
        heartbeat_limit: float,
        console_log: Path | None = None,
        emulator: str = "QEMU",
    ) -> None:
        self.heartbeat_limit = heartbeat_limit
        self._emulator = emulator
        self.console = bytearray()
        self._line = b""
        self._log = console_log.open("ab", buffering=0) if console_log else None
        self._port, port = socket.socketpair()
        self.monitor, monitor = socket.socketpair()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._port, self._wake_read, self._wake_write):
            end.setblocking(False)
        self._condition = threading.Condition()
        self._outgoing = bytearray()
        self._requests: dict[int, Request] = {}
        self._next_number = 1
        self._nonce: bytes | None = None
        self._hello = bytearray()
        self._frames = command_server.Frames()
        self._silent = 0.0
        self._poking = False
        self._doomed: float | None = None
        self._verdict = ""
        self._status: int | None = None
        self.lost: LabLostError | None = None
        self.closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: BaseException | None = None
        self.pid = 0
        started = threading.Event()
        arguments = [a.format(port=port.fileno(), monitor=monitor.fileno()) for a in argv]

        def run() -> None:
            try:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(port.fileno(), monitor.fileno()),
                    start_new_session=True,
                )
            except BaseException as error:
                self._failure = error
                return
            finally:
                port.close()
                monitor.close()
                started.set()
            self._pump(self._process)

        self._thread = threading.Thread(target=run, name="lab", daemon=True)
        self._thread.start()
        started.wait()
        if self._failure is not None:
            raise self._failure
        assert self._process is not None
        self.pid = self._process.pid

    # Methods that any thread may call.

    def hello(self, timeout: float) -> None:
        """Reset the command server, set L1's clock, and wait for the server's reply."""
        deadline = time.monotonic() + timeout
        nonce = secrets.token_bytes(command_server.NONCE_LENGTH)
        with self._condition:
            self._nonce = nonce
            self._hello.clear()
        self.send(command_server.HELLO, 0, nonce + struct.pack("!d", time.time()))
        with self._condition:
            while self._nonce is not None:
                self._check()
                if not self._condition.wait(deadline - time.monotonic()):
                    self._check()
                    raise LabLostError(f"L1 did not respond within {timeout:.0f} s", self.text())
            self._poking = True

    def open(self) -> Request:
        """Start a request."""
        with self._condition:
            self._check()
            request = Request(self._next_number)
            self._next_number += 1
            self._requests[request.number] = request
            return request

    def rest(self) -> None:
        """Make the command server idle.

        Afterwards, no data is in transit.
        """
        with self._condition:
            self._poking = False
        request = self.open()
        self.send(command_server.BYE, request.number)
        if self.take(request, self.heartbeat_limit) is None:
            raise self.give_up("L1's command server did not become idle")

    def forget(self, request: Request) -> None:
        """End a request, and drop frames that still arrive for it."""
        with self._condition:
            self._requests.pop(request.number, None)

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Queue a frame.

        This method waits while the queue is too long.

        :raises LabLostError: If L1 is lost.
        """
        with self._condition:
            while len(self._outgoing) > _OUTGOING_LIMIT:
                self._check()
                self._condition.wait()
            self._check()
            self._outgoing += command_server.frame(kind, number, payload)
        self._wake()

    def take(self, request: Request, timeout: float) -> tuple[int, bytes] | None:
        """Return the next frame of a request, or None after a timeout.

        :raises LabLostError: If L1 is lost, so that no more frames can arrive.
        """
        try:
            item = request.frames.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None
        if item is None:
            assert self.lost is not None
            raise self.lost
        return item

    def text(self) -> str:
        """Return the console output received so far."""
        return self.console.decode(errors="replace").replace("\r", "")

    def give_up(self, reason: str) -> LabLostError:
        """Mark L1 as lost for the caller's reason, and return the error to raise."""
        with self._condition:
            self._verdict = self._verdict or reason
            self._doomed = time.monotonic()
        self._wake()
        self._thread.join()
        assert self.lost is not None
        return self.lost

    def wait_end(self, timeout: float) -> bool:
        """Return whether QEMU exits within ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Kill QEMU without shutting down L1, because a lab keeps no state."""
        self.closing = True
        self._wake()
        self._thread.join()
        for end in (self._port, self.monitor, self._wake_read, self._wake_write):
            end.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread is already awake, or has exited
            self._wake_write.send(b"\0")

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost

    # Methods that only the channel's own thread calls.

    def _pump(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        console = process.stdout.fileno()
        os.set_blocking(console, False)
        pidfd = os.pidfd_open(process.pid)
        selector = selectors.DefaultSelector()
        for readable in (console, pidfd, self._wake_read, self._port):
            selector.register(readable, selectors.EVENT_READ)

        try:
            self._poll(selector, process, console, pidfd)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            selector.close()
            os.close(pidfd)
            process.stdout.close()
            if self._log:
                self._log.close()
            with self._condition:
                cause = self._verdict or "the lab was closed"
                self.lost = LabLostError(cause, self.text(), emulator_status=self._status)
                for request in self._requests.values():
                    request.frames.put(None)
                self._condition.notify_all()

    def _poll(
        self,
        selector: selectors.BaseSelector,
        process: subprocess.Popen[bytes],
        console: int,
        pidfd: int,
    ) -> None:
        """Handle all file descriptors until L1 is lost or the channel is closed."""
        before = next_poke = time.monotonic()
        while not self.closing:
            with self._condition:
                if self._poking and not self._outgoing and before >= next_poke:
                    self._outgoing += command_server.frame(command_server.POKE, 0)
                    next_poke = before + _TICK_SECONDS
                wanted = selectors.EVENT_READ
                if self._outgoing:
                    wanted |= selectors.EVENT_WRITE
            if selector.get_key(self._port).events != wanted:
                selector.modify(self._port, wanted)
            ready = {key.fd: mask for key, mask in selector.select(_TICK_SECONDS)}
            now = time.monotonic()
            # If the host was suspended, this process did not run either: count two ticks at most.
            self._silent += min(now - before, 2 * _TICK_SECONDS)
            before = now
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            if console in ready and not self._read_console(console):
                selector.unregister(console)
            if self._port.fileno() in ready:
                self._exchange(ready[self._port.fileno()])
            if pidfd in ready:
                while self._read_console(console):
                    pass
                if not self._verdict:
                    self._status = process.wait()
                    self._verdict = f"L1's {self._emulator} exited with status {self._status}"
            if self._nonce is None and self._silent > self.heartbeat_limit:
                self._verdict = f"no message from L1's command server for {self._silent:.0f} s"
                self._doomed = now
            if pidfd in ready or (self._doomed is not None and now >= self._doomed):
                break

    def _read_console(self, console: int) -> bool:
        """Read console output, detect kernel failures, and return False at end of file."""
        try:
            data = os.read(console, 1 << 16)
        except BlockingIOError:
            return False
        if self._log:
            self._log.write(data)
        self.console += data
        del self.console[:-_CONSOLE_BYTES]
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if self._doomed is None and _FATAL.search(line):
                self._doomed = time.monotonic() + _LAST_WORDS_SECONDS
                said = line.decode(errors="replace").strip()
                self._verdict = f"L1's kernel failed: {said}"
        return bool(data)

    def _exchange(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            with self._condition:
                try:
                    sent = self._port.send(self._outgoing[: 1 << 18])
                    del self._outgoing[:sent]
                except (BlockingIOError, ConnectionError):
                    pass
                self._condition.notify_all()
        try:
            data = self._port.recv(1 << 18)
        except (BlockingIOError, ConnectionError):
            return
        if data:
            self._silent = 0.0
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        with self._condition:
            if self._nonce is not None:
                # Data from an earlier connection may precede the reply.
                self._hello += data
                mark = command_server.MAGIC + self._nonce
                found = self._hello.find(mark)
                if found < 0:
                    return
                data = bytes(self._hello[found + len(mark) :])
                self._nonce = None
                self._frames = command_server.Frames()
                self._condition.notify_all()
            for kind, number, payload in self._frames.feed(data):
                if request := self._requests.get(number):
                    request.frames.put((kind, payload))


def exit_status(payload: bytes) -> dict[str, Any]:
    """Return the exit status in the payload of an EXIT frame."""
    status: dict[str, Any] = json.loads(payload)
    return status
