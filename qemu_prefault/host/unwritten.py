# SPDX-License-Identifier: GPL-2.0-or-later
"""Add up the unwritten parts of the files in a file system.

A process that has mapped such a file can allocate the unwritten parts without further checks. The
search examines the directories of the file system. A file that was deleted is visible only in the
maps and descriptors of the processes that use it (:mod:`qemu_prefault.host.used_files`). The name
of a process does not show whether it is a guest, because ``-name process=`` changes QEMU's name.
Therefore the search examines all processes if the files exist only in memory.

Other users can create any number of files, directories and processes, so the search is limited. A
process can also be invisible, for example in another PID namespace. Therefore the search compares
the number of files that it finds with the number that a tmpfs reports. If it finds too few, the
unwritten parts of the other files are unknown.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from ..errors import UnsupportedError
from .file_info import FileStatus
from .headroom import unescape
from .inside_root import open_in_mount, open_inside, reopened
from .proc_files import lines_of, read_optional
from .procfs import Process
from .used_files import UsedFiles, sees_all_processes

#: A mapped file: its device (major, minor) and its inode.
FileId = tuple[tuple[int, int], int]
#: Maximum number of directory entries to examine in a file system.
MAX_ENTRIES: Final = 50_000
#: Maximum depth of a directory to examine, below the root of the mount.
MAX_DEPTH: Final = 32
#: Maximum number of mount points of a file system to try.
MAX_MOUNTS: Final = 16
#: How long a result is reused: at least this time in seconds, and twice the search's duration.
REUSE_SECONDS: Final = 1.0
#: How often the search is repeated if it finds too few files, because other processes may create
#: and delete files during the search.
MAX_SEARCHES: Final = 3
#: A tmpfs counts one inode for each KiB of extended attributes since Linux 6.6 (mm/shmem.c,
#: BOGO_INODE_SIZE).
_INODE_SIZE: Final = 1024
#: The size of an attribute in addition to its name and value (fs/xattr.c, simple_xattr_space()).
_ATTRIBUTE_SIZE: Final = 40


@dataclass(frozen=True, slots=True)
class Unwritten:
    """The result of a search.

    :ivar device: The device number of the file system (major, minor).
    :ivar holes: The unwritten bytes of each file, by inode.
    :ivar unseen: The number of files that the search did not find, or None if this is unknown.
    """

    device: tuple[int, int]
    holes: dict[int, int]
    unseen: int | None

    def total(self, without: AbstractSet[FileId]) -> int:
        """Return the sum of the unwritten bytes, except those of the files in ``without``."""
        return sum(
            hole for inode, hole in self.holes.items() if (self.device, inode) not in without
        )


#: The results that can be reused, with the monotonic time at which they expire.
_results: dict[tuple[int, tuple[int, int]], tuple[Unwritten, float]] = {}


class _Search:
    """The files of one file system that a search has found.

    :ivar holes: The unwritten bytes of each file, by inode.
    :ivar count: The number of inodes that a tmpfs counts for these files. It counts a file with
        several directory entries several times (mm/shmem.c, ``shmem_link()``).
    :ivar complete: Whether no limit or permission has ended the search early.
    :ivar attributes: Whether to count the extended attributes of the files.
    """

    def __init__(self, *, attributes: bool) -> None:
        self.holes: dict[int, int] = {}
        self.count = 1  # the root directory
        self.complete = True
        self.attributes = attributes
        self._attribute_bytes = 0
        self._seen: set[int] = set()
        self._entries = MAX_ENTRIES

    def take_entry(self, inode: int) -> bool:
        """Count one directory entry, and return whether the search may examine it."""
        self._entries -= 1
        if self._entries < 0:
            self.complete = False
            return False
        self.count += 1
        self._seen.add(inode)
        return True

    def add_root(self, inode: int, *, whole: bool) -> None:
        """Add the directory at which the search starts."""
        self._seen.add(inode)
        self.count += not whole

    def add(self, status: FileStatus, path: str) -> None:
        """Add a file that a directory contains.

        :param path: A path at which the file can be opened.
        """
        if stat.S_ISREG(status.mode):
            self.holes[status.inode] = status.hole
        if self.attributes:
            self._attribute_bytes += _attributes_of(path)

    def add_used(self, inode: int, status: FileStatus, path: str) -> None:
        """Add a file that a process uses, unless a directory contains it."""
        if inode not in self._seen:
            self._seen.add(inode)
            self.count += 1 if stat.S_ISDIR(status.mode) else max(1, status.links)
            self.add(status, path)

    @property
    def most(self) -> int:
        """The largest number of inodes that the file system may count for these files."""
        return self.count - (-self._attribute_bytes // _INODE_SIZE)  # rounded up


def _attributes_of(path: str) -> int:
    """Return the bytes that a tmpfs counts for a file's extended attributes."""
    size = 0
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            value = os.getxattr(path, name)
            size += _ATTRIBUTE_SIZE + len(os.fsencode(name)) + len(value)
    return size


def _counts_attributes(path: str) -> bool:
    """Return whether a tmpfs counts extended attributes as inodes.

    The kernel does this since it supports user attributes on tmpfs (commit 2daf18a7884d).
    """
    try:
        os.getxattr(path, "user.qemu-prefault")
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def find_unwritten(
    process: Process, device: tuple[int, int], counted: str | None = None, *, in_memory: bool = True
) -> Unwritten:
    """Return the holes in the files of a file system.

    :param process: A process that uses the file system.
    :param counted: A path of a file on a tmpfs, which counts its inodes. None for other file
        systems: ``unseen`` is then 0.
    :param in_memory: Whether the files may exist only in memory. On a disk, deleted files count
        only if a process with QEMU's name has mapped them, because other programs map large sparse
        files.
    """
    key = (process.pid, device)
    result, expires = _results.get(key, (None, 0.0))
    if result is None or time.monotonic() > expires:
        began = time.monotonic()
        result = _search_until_complete(process, device, counted, in_memory)
        now = time.monotonic()
        _results[key] = result, now + max(REUSE_SECONDS, 2 * (now - began))
    return result


def _search_until_complete(
    process: Process, device: tuple[int, int], counted: str | None, in_memory: bool
) -> Unwritten:
    for attempt in range(MAX_SEARCHES):
        before = None if counted is None else _used_inodes(counted)
        # Most files have no descriptor without a mapping, and no extended attributes.
        thorough = attempt > 0
        attributes = thorough and counted is not None and _counts_attributes(counted)
        search = _Search(attributes=attributes)
        _run(search, process, device, in_memory, thorough)
        if counted is None:
            return Unwritten(device, search.holes, 0)
        after = _used_inodes(counted)
        if before is not None and after is not None:
            unseen: int | None = max(0, min(before, after) - search.most)
        else:
            unseen = 0 if search.complete and sees_all_processes() else None
        if unseen == 0:
            break
    return Unwritten(device, search.holes, unseen)


def _used_inodes(path: str) -> int | None:
    """Return the number of inodes in a tmpfs, or None if it does not count them (nr_inodes=0)."""
    try:
        figures = os.statvfs(path)
    except OSError:
        return None
    return figures.f_files - figures.f_ffree if figures.f_files else None


def _run(
    search: _Search, process: Process, device: tuple[int, int], in_memory: bool, thorough: bool
) -> None:
    root, whole = _open_root(process, device)
    if root is None:
        search.complete = False
    else:
        try:
            search.add_root(os.fstat(root).st_ino, whole=whole)
            _walk(root, search, 0)
        except OSError:
            search.complete = False
        finally:
            os.close(root)
    used = UsedFiles(process, device, named_only=not in_memory, descriptors=thorough)
    for inode, status, path in used.files():
        search.add_used(inode, status, path)
    search.complete &= used.complete


def _open_root(process: Process, device: tuple[int, int]) -> tuple[int | None, bool]:
    """Open the root directory of a file system.

    In QEMU's mount namespace, only a directory of the file system may be mounted. Then use a mount
    of this process, or else that directory.

    :returns: The descriptor or None, and whether the directory is the root of the file system.
    """
    mine = Process.find(os.getpid())
    for owner, whole in ((process, True), (mine, True), (process, False), (mine, False)):
        found = _open_mount(owner, device, whole=whole)
        if found is not None:
            return found, whole
    return None, False


def _open_mount(process: Process, device: tuple[int, int], *, whole: bool) -> int | None:
    """Open the root of a mount of a file system, and return its descriptor, or None.

    The process controls the names in its root directory. Therefore the descriptor is of the file
    system, or the mount point is not used.

    :param whole: Whether the mount must show the whole file system.
    """
    points = []
    for line in lines_of(read_optional(f"{process.proc}/mountinfo") or ""):
        fields = line.split(" ", 5)
        shown = len(fields) > 5 and fields[2] == f"{device[0]}:{device[1]}"
        if shown and (fields[3] == "/") == whole:
            points.append(unescape(fields[4]))
    for point in sorted(points)[:MAX_MOUNTS]:
        unusable = contextlib.suppress(OSError, ValueError, UnsupportedError)
        with unusable, open_inside(process, point) as found:
            status = os.fstat(found)
            if status.st_dev == os.makedev(*device) and stat.S_ISDIR(status.st_mode):
                return os.open(reopened(found), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return None


def _walk(directory: int, search: _Search, depth: int) -> None:
    """Add each file in a directory and below it."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if not search.take_entry(entry.inode()):
                return
            try:
                is_directory = entry.is_dir(follow_symlinks=False)
                if is_directory and depth >= MAX_DEPTH:
                    search.complete = False
                elif is_directory or search.attributes or entry.is_file(follow_symlinks=False):
                    _walk_entry(directory, entry.name, search, depth)
            except OSError as error:
                # EXDEV: a mount point. ENOENT: the file was deleted in the meantime.
                search.complete &= error.errno in (errno.EXDEV, errno.ENOENT)


def _walk_entry(directory: int, name: str, search: _Search, depth: int) -> None:
    with open_in_mount(directory, name) as found:
        status = os.fstat(found)
        search.add(FileStatus.of(status), reopened(found))
        if stat.S_ISDIR(status.st_mode):
            below = os.open(reopened(found), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _walk(below, search, depth + 1)
            finally:
                os.close(below)
