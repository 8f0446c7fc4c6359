# SPDX-License-Identifier: GPL-2.0-or-later
"""Add up the unwritten parts of the files in a file system.

A process that has mapped such a file can allocate the unwritten parts without further checks. The
sum is a lower bound. Other users can create any number of files, directories and processes, so the
number of processes and of directory entries is limited. The limits do not depend on time, because
on a slow host the search would then miss the files of other guests. Processes of root and of QEMU's
own user come first, because other users cannot create these.

A file that was deleted is visible only in the maps of the processes that have mapped it. The name
of a process does not show whether it is a guest, because ``-name process=`` changes QEMU's name.
Therefore the search reads the maps of all processes if the files exist only in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from ..errors import UnsupportedError
from . import proc_files
from .bounded import read_bounded
from .headroom import unescape
from .inside_root import open_in_mount, open_inside, reopened
from .proc_files import lines_of, read_optional
from .procfs import Process

#: A mapped file: its device (major, minor) and its inode.
FileId = tuple[tuple[int, int], int]
#: Maximum number of directory entries to examine in a file system.
MAX_ENTRIES: Final = 10_000
#: Maximum depth of a directory to examine, below the root of the mount.
MAX_DEPTH: Final = 32
#: Maximum number of mount points of a file system to try.
MAX_MOUNTS: Final = 16
#: Maximum number of other users' processes to examine, and of processes of root and QEMU's user.
MAX_PROCESSES: Final = 400
MAX_TRUSTED: Final = 4000
#: Maximum size of a process's maps to examine, in bytes. 1 MiB contains about 10,000 mappings.
MAX_MAPS: Final = 1 << 20
#: How long a result is reused: at least this time in seconds, and twice the search's duration.
REUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Result:
    """The unwritten bytes of each file, and the monotonic time at which the result expires."""

    holes: dict[int, int]
    expires: float


_results: dict[tuple[int, tuple[int, int]], _Result] = {}


class _Search:
    """The files of one file system that a search has found.

    :ivar holes: The unwritten bytes of each file, by inode.
    """

    def __init__(self, device: tuple[int, int]) -> None:
        self.holes: dict[int, int] = {}
        self._device = os.makedev(*device)
        self._entries = MAX_ENTRIES

    def take_entry(self) -> bool:
        """Count one directory entry, and return whether the search may examine it."""
        self._entries -= 1
        return self._entries >= 0

    def add(self, status: os.stat_result) -> None:
        """Add a file, unless it belongs to another file system."""
        if status.st_dev == self._device:
            self.holes[status.st_ino] = max(0, status.st_size - status.st_blocks * 512)


def unwritten_bytes(
    process: Process,
    device: tuple[int, int],
    without: AbstractSet[FileId],
    *,
    in_memory: bool = True,
) -> int:
    """Return the total size of the holes in the files of a file system.

    :param process: A process in whose mount namespace the file system is mounted.
    :param without: Files that do not count.
    :param in_memory: Whether the files exist only in memory. On a disk, deleted files count only if
        a process with QEMU's name has mapped them, because other programs map large sparse files.
    """
    key = (process.pid, device)
    result = _results.get(key)
    if result is None or time.monotonic() > result.expires:
        began = time.monotonic()
        holes = _find_holes(process, device, in_memory)
        now = time.monotonic()
        result = _Result(holes, now + max(REUSE_SECONDS, 2 * (now - began)))
        _results[key] = result
    return sum(hole for inode, hole in result.holes.items() if (device, inode) not in without)


def _find_holes(process: Process, device: tuple[int, int], in_memory: bool) -> dict[int, int]:
    """Return the unwritten bytes of each file that the search finds, by inode."""
    search = _Search(device)
    root = _open_root(process, device)
    if root is not None:
        try:
            with contextlib.suppress(OSError):
                _walk(root, search, 0)
        finally:
            os.close(root)
    left = {True: MAX_TRUSTED, False: MAX_PROCESSES}
    for trusted, has_name, pid in _other_processes(process):
        if (in_memory or has_name) and left[trusted] > 0:
            left[trusted] -= _add_mapped_files(pid, device, search)
    return search.holes


def _other_processes(process: Process) -> list[tuple[bool, bool, int]]:
    """Return the other processes.

    A process is a tuple of three items: whether it belongs to root or to QEMU's user, whether it
    has a name of QEMU, and its pid. The processes of these users are first in the list. Among the
    others, those with such a name are first.
    """
    found = []
    trusted_users = {0, os.stat(process.proc).st_uid}
    for entry in os.listdir(proc_files.PROC):
        if not entry.isdecimal() or int(entry) == process.pid:
            continue
        with contextlib.suppress(OSError):
            trusted = os.stat(f"{proc_files.PROC}/{entry}").st_uid in trusted_users
            name = read_optional(f"{proc_files.PROC}/{entry}/comm") or ""
            found.append((not trusted, "qemu" not in name and "kvm" not in name, int(entry)))
    return [(not untrusted, not unnamed, pid) for untrusted, unnamed, pid in sorted(found)]


def _add_mapped_files(pid: int, device: tuple[int, int], search: _Search) -> bool:
    """Add each file of ``device`` that a process maps, also deleted files.

    A private mapping of a file on tmpfs allocates the file's pages, too (mm/shmem.c,
    ``shmem_fault()``).

    :returns: Whether the process has mappings. Kernel threads have none.
    """
    areas = re.compile(
        rb"^([0-9a-f]+-[0-9a-f]+) [r-][w-][x-][sp] [0-9a-f]+ %02x:%02x ([0-9]+) " % device,
        re.MULTILINE,
    )
    try:
        maps = read_bounded(f"{proc_files.PROC}/{pid}/maps", MAX_MAPS)
    except OSError:
        return True
    for area in {match[2]: match[1] for match in areas.finditer(maps)}.values():
        with contextlib.suppress(OSError):
            search.add(os.stat(f"{proc_files.PROC}/{pid}/map_files/{area.decode()}"))
    return bool(maps)


def _open_root(process: Process, device: tuple[int, int]) -> int | None:
    """Open the root directory of a file system, and return its descriptor, or None.

    In QEMU's mount namespace, only a directory of the file system may be mounted. Then use a mount
    of this process, or else that directory.
    """
    mine = Process.find(os.getpid())
    whole = _open_mount(process, device, whole=True)
    whole = _open_mount(mine, device, whole=True) if whole is None else whole
    return _open_mount(process, device, whole=False) if whole is None else whole


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
    """Add each regular file in a directory and below it."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if not search.take_entry():
                return
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False) or (
                    depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False)
                ):
                    _walk_entry(directory, entry.name, search, depth)


def _walk_entry(directory: int, name: str, search: _Search, depth: int) -> None:
    with open_in_mount(directory, name) as found:
        status = os.fstat(found)
        if stat.S_ISREG(status.st_mode):
            search.add(status)
        elif stat.S_ISDIR(status.st_mode):
            below = os.open(reopened(found), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _walk(below, search, depth + 1)
            finally:
                os.close(below)
