# SPDX-License-Identifier: GPL-2.0-or-later
"""Run Bochs, and connect the command server's socket to L1's stream.

:class:`.channel.Channel` starts this program in the place of QEMU, with the same interface: stdout
is L1's console, a socket carries the command server's frames, and the program exits when the
emulator exits, with the emulator's status. The program and Bochs end if the channel is closed.

The program's arguments are the socket's file descriptor, the control socket's file descriptor, the
directory with ``bochsrc`` and the disks, and the path of Bochs. If the directory contains a saved
machine, the program restores this machine. If the control socket receives a byte, the program lets
Bochs save the machine in the directory and exit.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tty
from pathlib import Path
from typing import Final

from . import disk_stream

#: The files in the directory.
STREAM: Final = "stream.img"
PID: Final = "bochs.pid"
LOG: Final = "bochs.log"
OUTPUT: Final = "bochs.out"
SAVED: Final = "saved"
STREAM_STATE: Final = "stream.json"
# Bochs ends with a panic if the guest turns the machine off (iodev/acpi.cc).
_POWERED_OFF: Final = "ACPI control: soft power off"
_TAIL_LINES: Final = 10


def start(program: str, console: int, terminal: str) -> subprocess.Popen[bytes]:
    """Start Bochs with COM1 on a file descriptor and COM2 on a terminal."""
    lines = [
        f"com1: enabled=1, mode=file, dev=/proc/self/fd/{console}",
        f"com2: enabled=1, mode=term, dev={terminal}",
    ]
    configuration = Path(SAVED, "config")
    if configuration.exists():
        # Bochs ignores options when it restores a machine.
        others = [
            line
            for line in configuration.read_text().splitlines()
            if not line.startswith(("com1:", "com2:"))
        ]
        configuration.write_text("\n".join([*others, *lines, ""]))
        argv = [program, "-q", "-r", SAVED]
    else:
        argv = [program, "-q", "-f", "bochsrc", *lines]
    with open(OUTPUT, "wb") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(console,),
            env={**os.environ, "BOCHS_SAVE": SAVED},
        )


def wait_restored(bell: int, port: int, pidfd: int) -> None:
    """Wait until L1 rings the doorbell, until Bochs exits, or until the channel is closed.

    Bochs copies the saved disk of the stream over the stream's file while it restores L1, and would
    overwrite data that was sent before.
    """
    poll = select.poll()
    for fd, mask in ((bell, select.POLLIN), (pidfd, select.POLLIN), (port, 0)):
        poll.register(fd, mask)
    poll.poll()


def serve(
    process: subprocess.Popen[bytes], pidfd: int, bridge: disk_stream.Bridge, control: int
) -> None:
    """Transfer data until Bochs exits or the channel is closed."""
    bridge.register(pidfd)
    bridge.register(control)
    while True:
        ready = bridge.step()
        if ready is None or pidfd in ready:
            break
        if control in ready:
            if not os.read(control, 1):
                break
            Path(SAVED).mkdir()
            process.send_signal(signal.SIGUSR1)
    if ready is None or pidfd not in ready:
        process.kill()


def exit_like(status: int) -> None:
    """Exit with the status with which Bochs exited."""
    log = Path(LOG)
    text = log.read_text(errors="replace") if log.exists() else ""
    if status > 0 and _POWERED_OFF in text:
        sys.exit(0)
    if status:
        lines = [
            *text.splitlines()[-_TAIL_LINES:],
            *Path(OUTPUT).read_text(errors="replace").splitlines()[-_TAIL_LINES:],
        ]
        for text_line in lines:
            print(f"bochs: {text_line}", flush=True)
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def main() -> None:
    port, control, directory, program = sys.argv[1:]
    os.chdir(directory)
    disk = os.open(STREAM, os.O_RDWR | os.O_CLOEXEC)
    # This process keeps the terminal open, so that a read never fails before Bochs opens it.
    bell, terminal = os.openpty()
    tty.setraw(terminal)
    os.set_blocking(bell, False)
    console = os.dup(1)
    process = start(program, console, os.ttyname(terminal))
    Path(PID).write_text(str(process.pid))
    pidfd = os.pidfd_open(process.pid)
    stream = disk_stream.DiskStream(disk, disk_stream.L0)
    state = Path(STREAM_STATE)
    if state.exists():
        stream.resume(json.loads(state.read_text()))
        wait_restored(bell, int(port), pidfd)
    bridge = disk_stream.Bridge(socket.socket(fileno=int(port)), stream, bell)
    serve(process, pidfd, bridge, int(control))
    status = process.wait()
    state.write_text(json.dumps(stream.state()))
    exit_like(status)


if __name__ == "__main__":
    main()
