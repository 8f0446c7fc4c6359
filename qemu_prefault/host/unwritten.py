# SPDX-License-Identifier: GPL-2.0-or-later
"""Add up the unwritten parts of the files in a file system.

A process that has mapped such a file can allocate the unwritten parts without further checks. The
sum is a lower bound. Other users can create any number of files, directories and processes, so the
number of processes and of directory entries is limited. The limits do not depend on time, because
on a slow host the search would then miss the files of other guests. Processes of root and of QEMU's
own user come first, because other users cannot create these.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from ..errors import UnsupportedError
from . import proc_files
from .bounded import read_bounded
from .headroom import unescape
from .inside_root import open_inside, reopened
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
#: Maximum number of other QEMU processes to examine, and maximum size of each one's maps in bytes.
#: 1 MiB contains about 10,000 mappings.
MAX_PROCESSES: Final = 400
MAX_MAPS: Final = 1 << 20
#: How long a result is reused: at least this time in seconds, and twice the search's duration.
REUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Result:
    """The unwritten bytes of each file, and the monotonic time at which the result expires."""

    holes: dict[int, int]
    expires: float


_results: dict[tuple[int, tuple[int, int]], _Result] = {}


class _Budget:
    """The number of directory entries that a search may still examine."""

    def __init__(self) -> None:
        self._entries = MAX_ENTRIES

    def take(self) -> bool:
        """Count one entry, and return whether the search may examine it."""
        self._entries -= 1
        return self._entries >= 0


def unwritten_bytes(process: Process, device: tuple[int, int], without: AbstractSet[FileId]) -> int:
    """Return the total size of the holes in the files of a file system.

    :param process: A process in whose mount namespace the file system is mounted.
    :param without: Files that do not count.
    """
    key = (process.pid, device)
    result = _results.get(key)
    if result is None or time.monotonic() > result.expires:
        began = time.monotonic()
        holes = {
            status.st_ino: max(0, status.st_size - status.st_blocks * 512)
            for status in _files(process, device)
        }
        now = time.monotonic()
        result = _Result(holes, now + max(REUSE_SECONDS, 2 * (now - began)))
        _results[key] = result
    return sum(hole for inode, hole in result.holes.items() if (device, inode) not in without)


def _files(process: Process, device: tuple[int, int]) -> Iterator[os.stat_result]:
    for pid in _other_qemus(process)[:MAX_PROCESSES]:
        yield from _mapped_files(pid, device)
    top = _open_mount(process, device)
    if top is not None:
        try:
            with contextlib.suppress(OSError):
                yield from _walk(top, os.makedev(*device), _Budget(), 0)
        finally:
            os.close(top)


def _other_qemus(process: Process) -> list[int]:
    """Return the pids of other processes with QEMU's names.

    The processes of root and of this QEMU's user are first in the list.
    """
    found = []
    trusted = {0, os.stat(process.proc).st_uid}
    for entry in os.listdir(proc_files.PROC):
        if not entry.isdecimal() or int(entry) == process.pid:
            continue
        name = read_optional(f"{proc_files.PROC}/{entry}/comm") or ""
        if "qemu" in name or "kvm" in name:
            with contextlib.suppress(OSError):
                owner = os.stat(f"{proc_files.PROC}/{entry}").st_uid
                found.append((owner not in trusted, int(entry)))
    return [pid for _, pid in sorted(found)]


def _mapped_files(pid: int, device: tuple[int, int]) -> Iterator[os.stat_result]:
    """Yield the status of each file of ``device`` that a process maps, also of deleted files."""
    shared = re.compile(
        rb"^([0-9a-f]+-[0-9a-f]+) [r-][w-][x-]s [0-9a-f]+ %02x:%02x ([0-9]+) " % device,
        re.MULTILINE,
    )
    try:
        maps = read_bounded(f"{proc_files.PROC}/{pid}/maps", MAX_MAPS)
    except OSError:
        return
    for area in {match[2]: match[1] for match in shared.finditer(maps)}.values():
        with contextlib.suppress(OSError):
            yield os.stat(f"{proc_files.PROC}/{pid}/map_files/{area.decode()}")


def _open_mount(process: Process, device: tuple[int, int]) -> int | None:
    """Open the root of a mount of a file system, and return its descriptor, or None.

    The process controls the names in its root directory. Therefore the descriptor is of the file
    system, or the mount point is not used.
    """
    mounts: list[tuple[bool, str]] = []
    for line in lines_of(read_optional(f"{process.proc}/mountinfo") or ""):
        fields = line.split(" ", 5)
        if len(fields) > 5 and fields[2] == f"{device[0]}:{device[1]}":
            mounts.append((fields[3] != "/", unescape(fields[4])))
    for _, point in sorted(mounts)[:MAX_MOUNTS]:
        unusable = contextlib.suppress(OSError, ValueError, UnsupportedError)
        with unusable, open_inside(process, point) as found:
            status = os.fstat(found)
            if status.st_dev == os.makedev(*device) and stat.S_ISDIR(status.st_mode):
                return os.open(reopened(found), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return None


def _walk(directory: int, device: int, budget: _Budget, depth: int) -> Iterator[os.stat_result]:
    """Yield the status of each regular file of ``device`` in a directory and below it."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if not budget.take():
                return
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_dev == device:
                        yield status
                elif depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                    yield from _walk_below(directory, entry.name, device, budget, depth + 1)


def _walk_below(
    directory: int, name: str, device: int, budget: _Budget, depth: int
) -> Iterator[os.stat_result]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    below = os.open(name, flags, dir_fd=directory)
    try:
        if os.fstat(below).st_dev == device:
            yield from _walk(below, device, budget, depth)
    finally:
        os.close(below)
