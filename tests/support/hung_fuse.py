# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount a FUSE file system whose server stops responding.

The file system contains one file, :data:`NAME`. A system call that waits for the server blocks
until the end of the block, even if its process is killed.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAME = "ram"
_INODE = 2
# include/uapi/linux/fuse.h
_LOOKUP, _GETATTR, _OPEN, _STATFS, _RELEASE, _FLUSH, _INIT, _OPENDIR = 1, 3, 14, 17, 18, 25, 26, 27


def _attributes(inode: int, size: int) -> bytes:
    mode = 0o100600 if inode == _INODE else 0o40700
    return struct.pack("<6Q10I", inode, size, *[0] * 7, mode, 1, 0, 0, 0, 4096, 0)


def _answers(inode: int, size: int) -> dict[int, bytes]:
    """Return the reply to each supported operation on an inode."""
    opened = struct.pack("<Q2I", 1, 0, 0)
    return {
        _INIT: struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 12, 12, 65536, 1, 0, 0, *[0] * 8),
        _LOOKUP: struct.pack("<4Q2I", _INODE, 0, 0, 0, 0, 0) + _attributes(_INODE, size),
        _GETATTR: struct.pack("<Q2I", 0, 0, 0) + _attributes(inode, size),
        _OPEN: opened,
        _OPENDIR: opened,
        _STATFS: struct.pack("<5Q10I", *[1 << 20] * 5, 4096, 255, 4096, *[0] * 7),
        _RELEASE: b"",
        _FLUSH: b"",
    }


def _serve(fd: int, size: int, hung: threading.Event) -> None:
    with suppress(OSError):  # the file system is unmounted
        while request := os.read(fd, 1 << 17):
            _, operation, unique, inode = struct.unpack_from("<2I2Q", request)
            if hung.is_set():
                continue
            answers = _answers(inode, size)
            body = answers.get(operation, b"")
            error = 0 if operation in answers else -errno.ENOSYS
            with suppress(OSError):  # the request needs no reply
                os.write(fd, struct.pack("<IiQ", 16 + len(body), error, unique) + body)


@contextmanager
def fuse(point: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount the file system, and yield a function after whose call the server does not respond.

    :param size: The size of the file in bytes.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    point.mkdir()
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    command = ["mount", "-i", "-t", "fuse", "-o", options, "none", str(point)]
    done = subprocess.run(command, check=False, capture_output=True, pass_fds=[fd])
    if done.returncode:
        os.close(fd)
        pytest.skip(f"cannot mount FUSE: {done.stderr.decode().strip()}")
    hung = threading.Event()
    server = threading.Thread(target=_serve, args=(fd, size, hung), daemon=True)
    server.start()
    try:
        yield hung.set
    finally:
        # A forced unmount aborts the connection, and wakes the processes that wait.
        subprocess.run(["umount", "--force", "--lazy", point], check=True)
        server.join(20)
        os.close(fd)
