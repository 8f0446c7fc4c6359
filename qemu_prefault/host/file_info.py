# SPDX-License-Identifier: GPL-2.0-or-later
"""Properties of files that other processes use, without an unlimited wait for a server.

A FUSE server that does not respond blocks a process that calls stat(2) or statfs(2), and the
process cannot even be killed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Final

#: How long to wait for the server of a file system, in milliseconds.
SERVER_MILLISECONDS: Final = 2000


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The status of a file, as the kernel knows it without a request to a server.

    :ivar allocated: The number of bytes that are allocated for the file.
    :ivar links: The number of directory entries of the file.
    """

    device: int
    inode: int
    size: int
    allocated: int
    links: int
    mode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStatus:
        """Return the status that stat(2) has returned."""
        allocated = found.st_blocks * 512
        return cls(
            found.st_dev, found.st_ino, found.st_size, allocated, found.st_nlink, found.st_mode
        )

    @property
    def hole(self) -> int:
        """The number of bytes that the file can still allocate without growing."""
        return max(0, self.size - self.allocated) if stat.S_ISREG(self.mode) else 0


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The figures of a file system.

    :ivar type: The number of the file system's type (include/uapi/linux/magic.h).
    :ivar size: The size in bytes, or 0 if the file system has no limit or does not report it.
    :ivar available: The number of free bytes.
    :ivar inodes: The maximum number of inodes, or 0 if it is unknown or unlimited.
    """

    type: int
    size: int
    available: int
    inodes: int
    free_inodes: int


def file_status(path: str) -> FileStatus:
    """Return the status of a file. If the path is a link in /proc, follow the link.

    :raises OSError: If the file cannot be accessed.
    """
    from .._native import ffi, lib  # noqa: PLC0415

    found = ffi.new("struct file_status *")
    _check(int(lib.pf_file_status(os.fsencode(path), found)), path)
    return FileStatus(
        found.device, found.inode, found.size, found.allocated, found.links, found.mode
    )


def file_system(path: str) -> FileSystem:
    """Return the figures of a file's file system.

    :raises OSError: If the file cannot be accessed. The errno is ETIMEDOUT if the server of the
        file system does not respond.
    """
    from .._native import ffi, lib  # noqa: PLC0415

    found = ffi.new("struct file_system *")
    _check(int(lib.pf_file_system(os.fsencode(path), SERVER_MILLISECONDS, found)), path)
    return FileSystem(found.type, found.size, found.available, found.inodes, found.free_inodes)


def _check(result: int, path: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), path)
