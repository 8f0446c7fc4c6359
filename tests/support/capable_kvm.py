# SPDX-License-Identifier: GPL-2.0-or-later
"""Execute a program to which KVM seems to offer KVM_PRE_FAULT_MEMORY.

The plugin populates only if KVM offers the ioctl. With this module, tests can run the plugin on a
host whose KVM lacks the ioctl. A seccomp filter passes the ioctl, and the query for its capability,
to a supervisor. The supervisor simulates a KVM that offers the ioctl, and whose ioctl always
succeeds for the whole range. The kernel executes all other system calls. The supervisor exits when
the program exits.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
from pathlib import Path
from typing import NoReturn

from .under_filter import (
    JUMP_EQUAL,
    LOAD,
    PR_SET_NO_NEW_PRIVS,
    RETURN,
    SECCOMP,
    SET_MODE_FILTER,
    Program,
)

ALLOW, USER_NOTIF, NEW_LISTENER = 0x7FFF0000, 0x7FC00000, 8
IOCTL = 16
KVM_CHECK_EXTENSION, CAP_PRE_FAULT_MEMORY = 0xAE03, 236
KVM_PRE_FAULT_MEMORY = 0xC040AED5
# include/uapi/linux/seccomp.h: struct seccomp_notif and struct seccomp_notif_resp
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
NOTIFICATION, RESPONSE = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
FILTER = (
    (LOAD, 0, 0, 0),
    (JUMP_EQUAL, 0, 6, IOCTL),
    (LOAD, 0, 0, 24),
    (JUMP_EQUAL, 3, 0, KVM_PRE_FAULT_MEMORY),
    (JUMP_EQUAL, 0, 3, KVM_CHECK_EXTENSION),
    (LOAD, 0, 0, 32),
    (JUMP_EQUAL, 0, 1, CAP_PRE_FAULT_MEMORY),
    (RETURN, 0, 0, USER_NOTIF),
    (RETURN, 0, 0, ALLOW),
)


def prefix() -> list[str]:
    """Return a command prefix with which KVM seems to offer the ioctl."""
    directory = Path(__file__).parent.parent
    return ["env", f"PYTHONPATH={directory}", sys.executable, "-m", __name__]


def install() -> int:
    """Install the filter in this process and return the listener's descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in FILTER)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = Program(len(FILTER), ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    fd: int = libc.syscall(SECCOMP, SET_MODE_FILTER, NEW_LISTENER, ctypes.byref(program))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return fd


def answer(tid: int, request: int, argument: int) -> int:
    """Simulate a thread's ioctl, and return its result."""
    if request == KVM_CHECK_EXTENSION:
        return 1
    with open(f"/proc/{tid}/mem", "r+b", buffering=0) as memory:
        memory.seek(argument)
        start, size = struct.unpack("QQ", memory.read(16))
        memory.seek(argument)
        memory.write(struct.pack("QQ", start + size, 0))
    return 0


def supervise(fd: int) -> None:
    """Simulate the ioctls until no process uses the filter."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll()[0][1] & select.POLLHUP:
        received = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(fd, NOTIF_RECV, received)
            identity, tid, _, _, _, _, _, request, argument, *_ = NOTIFICATION.unpack(received)
            result = answer(tid, request & 0xFFFFFFFF, argument)
            fcntl.ioctl(fd, NOTIF_SEND, RESPONSE.pack(identity, result, 0, 0))
        except OSError:  # a signal interrupted the ioctl, or the process has exited
            continue


def run_supervisor(ours: socket.socket, theirs: socket.socket) -> NoReturn:
    theirs.close()
    if os.fork():  # QEMU must not have a child process
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    if fds:
        supervise(fds[0])
    os._exit(0)


def main() -> NoReturn:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        run_supervisor(ours, theirs)
    os.waitpid(child, 0)
    ours.close()
    fd = install()
    socket.send_fds(theirs, [b"x"], [fd])
    os.close(fd)
    theirs.close()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
