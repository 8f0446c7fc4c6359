# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the command server in an L1 without virtio-serial, with a stream on a disk as its port.

This program and the modules that it imports are copied to L1. The command server runs unmodified.
A second process connects the command server's socket to the disk.
"""

from __future__ import annotations

import glob
import os
import socket
import termios
import tty

from .command_server import CommandServer
from .disk_stream import L1, Bridge, DiskStream

_DOORBELL = "/dev/ttyS1"


def find_stream() -> DiskStream:
    """Open the disk with the stream.

    The names of the disks depend on the order in which the kernel finds them.
    """
    for path in sorted(glob.glob("/dev/sd?")):
        disk = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return DiskStream(disk, L1)
        except ValueError:
            os.close(disk)
    raise SystemExit("lab-command-server: no disk with a stream")


def open_doorbell() -> int:
    """Open the serial line as a raw terminal."""
    line = os.open(_DOORBELL, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    tty.setraw(line, termios.TCSANOW)
    return line


def main() -> None:
    os.nice(-10)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    stream, bell = find_stream(), open_doorbell()
    near, far = socket.socketpair()
    if os.fork() == 0:
        near.close()
        bridge = Bridge(far, stream, bell)
        while bridge.step() is not None:
            pass
        os._exit(1)
    far.close()
    # When the host reads this line, it knows that L1 has booted.
    print("lab-command-server: ready", flush=True)
    CommandServer(near.detach()).run()


if __name__ == "__main__":
    main()
