# SPDX-License-Identifier: GPL-2.0-or-later
"""The command server, which runs commands in L1 for the host.

The command server communicates with the host over a virtio-serial port. The server is the only
child of L1's init, supports Python 3.11 to 3.14, and uses only the standard library. The host also
imports this module, because both sides use the same definitions of the protocol.

A frame consists of a header and a payload. The header is big-endian and contains the frame's type,
the request number and the payload's length. Several requests can be in progress at the same time.
The host assigns the request numbers. The server only runs commands. The host transfers files
through the stdin and stdout of ``cat`` and ``tar``.

The server's loop never blocks on a command. The loop queues input that a command has not read yet.
While the host does not read from the port, the loop does not read the commands' output. The loop
sends a heartbeat once a second. If the heartbeats stop, the host concludes that L1 hangs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from typing import Any

HEADER = struct.Struct("!BII")
MAGIC = b"\x00lab-hello\x00"
NONCE_LENGTH = 16
BEAT_SECONDS = 1.0

# Host to server.
HELLO = 1  # nonce + wall-clock time as a big endian double: reset all state
RUN = 2  # JSON: argv, env, cwd, timeout, grace
STDIN = 3  # bytes; empty is the end of file
KILL = 4  # one byte: the signal number
BYE = 5  # stop heartbeats and commands before a snapshot
POKE = 6  # no operation; its interrupt wakes L1 (see Channel)
# Server to host. The reply to HELLO is MAGIC + nonce, which is not a frame (see Channel).
STDOUT = 16
STDERR = 17
EXIT = 18  # JSON: returncode, timed_out, or error (an errno name) and strerror
BEAT = 19

_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 15
_PENDING_LIMIT = 1 << 22


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    """Return a frame with this type, request number and payload, as bytes."""
    return HEADER.pack(kind, number, len(payload)) + payload


class Frames:
    """A parser that splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Add received bytes, and yield the frames that are complete."""
        self.buffer += data
        frames = []
        start = 0
        while len(self.buffer) - start >= HEADER.size:
            kind, number, length = HEADER.unpack_from(self.buffer, start)
            end = start + HEADER.size + length
            if len(self.buffer) < end:
                break
            frames.append((kind, number, bytes(self.buffer[start + HEADER.size : end])))
            start = end
        del self.buffer[:start]
        return frames


class Command:
    """One running command and its pipes."""

    def __init__(self, server: CommandServer, number: int, request: dict[str, Any]) -> None:
        self.server = server
        self.number = number
        self.grace = float(request.get("grace", 5.0))
        timeout = request.get("timeout")
        self.deadline = None if timeout is None else time.monotonic() + float(timeout)
        self.timed_out = False
        self.terminated = False
        self.returncode: int | None = None
        self.unread = bytearray()
        self.stdin_ended = False
        environment = dict(os.environ)
        environment.update(request.get("env") or {})
        self.process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=request.get("cwd") or "/root",
            env=environment,
            start_new_session=True,
            preexec_fn=_become_ordinary,  # noqa: PLW1509 (there are no threads)
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin = self.process.stdin.fileno()
        self.outputs = {self.process.stdout.fileno(): STDOUT, self.process.stderr.fileno(): STDERR}
        self.paused = False
        self.pidfd = os.pidfd_open(self.process.pid)
        self.drain_until = 0.0
        select = server.selector.register
        select(self.pidfd, selectors.EVENT_READ, self.on_exit)
        for fd in self.outputs:
            os.set_blocking(fd, False)
            select(fd, selectors.EVENT_READ, self.on_output)
        os.set_blocking(self.stdin, False)
        self.stdin_open = True
        self.stdin_selected = False

    def on_output(self, fd: int, _mask: int) -> None:
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self.server.send(self.outputs[fd], self.number, data)
            return
        self.server.selector.unregister(fd)
        del self.outputs[fd]
        self.finish_if_done()

    def pause(self, paused: bool) -> None:
        """Pause or resume reading the command's output."""
        if paused == self.paused:
            return
        self.paused = paused
        for fd in self.outputs:
            if paused:
                self.server.selector.unregister(fd)
            else:
                self.server.selector.register(fd, selectors.EVENT_READ, self.on_output)

    def feed(self, data: bytes) -> None:
        if not data:
            self.stdin_ended = True
        self.unread += data
        self.on_stdin(self.stdin, 0)

    def on_stdin(self, _fd: int, _mask: int) -> None:
        if not self.stdin_open:
            self.unread.clear()
            return
        try:
            while self.unread:
                written = os.write(self.stdin, self.unread[:_READ_BYTES])
                del self.unread[:written]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            # The command has closed its input. Its exit status shows whether that is an error.
            self.unread.clear()
            self.stdin_ended = True
        if self.unread and not self.stdin_selected:
            self.server.selector.register(self.stdin, selectors.EVENT_WRITE, self.on_stdin)
            self.stdin_selected = True
        elif not self.unread and self.stdin_selected:
            self.server.selector.unregister(self.stdin)
            self.stdin_selected = False
        if self.stdin_ended and not self.unread:
            self.close_stdin()

    def close_stdin(self) -> None:
        if self.stdin_selected:
            self.server.selector.unregister(self.stdin)
            self.stdin_selected = False
        if self.stdin_open:
            self.stdin_open = False
            assert self.process.stdin
            self.process.stdin.close()

    def on_exit(self, _fd: int, _mask: int) -> None:
        self.server.selector.unregister(self.pidfd)
        os.close(self.pidfd)
        self.returncode = self.process.wait()
        self.unread.clear()
        self.close_stdin()
        # The command's output is in the pipes now. Read it for a short time only, because a daemon
        # that the command started may keep the pipes open.
        self.drain_until = time.monotonic() + 0.5
        self.finish_if_done()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def on_time(self, now: float) -> None:
        """Apply the time limit, the grace period, and the limit for draining the pipes."""
        if self.returncode is not None:
            if now >= self.drain_until and not self.paused:
                self.finish()
        elif self.deadline is not None and now >= self.deadline:
            self.timed_out = True
            self.signal(signal.SIGKILL if self.terminated else signal.SIGTERM)
            self.terminated = True
            self.deadline = now + self.grace

    def finish_if_done(self) -> None:
        if self.returncode is not None and not self.outputs:
            self.finish()

    def finish(self) -> None:
        self.close()
        status = {"returncode": self.returncode, "timed_out": self.timed_out}
        self.server.send(EXIT, self.number, json.dumps(status).encode())

    def close(self) -> None:
        """Release all resources except the process, which the caller must reap."""
        self.server.commands.pop(self.number, None)
        self.pause(True)
        self.close_stdin()
        assert self.process.stdout and self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()
        if self.returncode is None:
            self.server.selector.unregister(self.pidfd)
            os.close(self.pidfd)


def _become_ordinary() -> None:
    # The server has a high priority and is exempt from the OOM killer, so that it responds even if
    # commands use all CPU time or memory. The commands must not inherit these settings.
    os.nice(10)
    _write("/proc/self/oom_score_adj", "0")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class CommandServer:
    """The loop that serves one port and runs the commands."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.commands: dict[int, Command] = {}
        self.frames = Frames()
        self.outgoing = bytearray()
        self.beating = False
        self.next_beat = 0.0
        os.set_blocking(port, False)
        self.port_mask = 0
        self.select_port(selectors.EVENT_READ)

    def select_port(self, mask: int) -> None:
        if mask == self.port_mask:
            return
        if self.port_mask:
            self.selector.unregister(self.port)
        if mask:
            self.selector.register(self.port, mask, self.on_port)
        self.port_mask = mask

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        self.outgoing += frame(kind, number, payload)
        self.flush()

    def flush(self) -> None:
        while self.outgoing:
            try:
                written = os.write(self.port, self.outgoing[:_WRITE_BYTES])
            except BlockingIOError:
                break
            del self.outgoing[:written]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outgoing else 0)
        self.select_port(wanted)
        for command in list(self.commands.values()):
            command.pause(len(self.outgoing) > _PENDING_LIMIT)

    def on_port(self, _fd: int, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush()
        try:
            data = os.read(self.port, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            # While no host is connected, poll() returns immediately. Sleep to avoid a busy loop.
            time.sleep(0.05)
            return
        for kind, number, payload in self.frames.feed(data):
            self.handle(kind, number, payload)

    def handle(self, kind: int, number: int, payload: bytes) -> None:
        if kind == HELLO:
            self.reset()
            nonce, clock = payload[:NONCE_LENGTH], struct.unpack("!d", payload[NONCE_LENGTH:])[0]
            # After a restore, L1's clock still shows the time of the snapshot.
            if abs(time.time() - clock) > 0.5:
                time.clock_settime(time.CLOCK_REALTIME, clock)
            self.outgoing += MAGIC + nonce
            self.flush()
            self.beating = True
        elif kind == BYE:
            self.reset()
            self.send(BEAT, number)
        elif kind == RUN:
            self.start(number, json.loads(payload))
        elif command := self.commands.get(number):
            if kind == STDIN:
                command.feed(payload)
            elif kind == KILL:
                command.signal(payload[0])

    def reset(self) -> None:
        self.beating = False
        for command in list(self.commands.values()):
            command.signal(signal.SIGKILL)
            command.close()
            command.process.wait()
        self.outgoing.clear()

    def start(self, number: int, request: dict[str, Any]) -> None:
        try:
            self.commands[number] = Command(self, number, request)
        except (OSError, subprocess.SubprocessError) as error:
            code = getattr(error, "errno", None) or errno.EIO
            status = {"error": errno.errorcode.get(code, "EIO"), "strerror": str(error)}
            self.send(EXIT, number, json.dumps(status).encode())

    def run(self) -> None:
        while True:
            now = time.monotonic()
            for command in list(self.commands.values()):
                command.on_time(now)
            if self.beating and now >= self.next_beat:
                self.next_beat = now + BEAT_SECONDS
                # Do not queue heartbeats while the host does not read.
                if not self.outgoing:
                    self.send(BEAT, 0)
            pause = 0.1 if self.commands else BEAT_SECONDS / 2
            for key, mask in self.selector.select(pause if self.beating else None):
                # An earlier callback in this loop may have closed or reused the descriptor.
                if self.selector.get_map().get(key.fd) == key:
                    key.data(key.fd, mask)


def open_port(name: str) -> int:
    """Open the virtio-serial port with this name.

    L1 does not run udev, so the links in /dev/virtio-ports do not exist.
    """
    for path in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(path) as file:
            if file.read().strip() == name:
                device = os.path.basename(os.path.dirname(path))
                return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC)
    raise SystemExit(f"lab-command-server: no virtio-serial port {name!r}")


def main() -> None:
    os.nice(-10)
    _write("/proc/self/oom_score_adj", "-1000")
    # The driver allows only one open of the port.
    port = open_port(sys.argv[1])
    fcntl.fcntl(port, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    # When the host reads this line, it knows that L1 has booted.
    print("lab-command-server: ready", flush=True)
    CommandServer(port).run()


if __name__ == "__main__":
    main()
