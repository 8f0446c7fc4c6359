# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory mappings of a process, from ``/proc/PID/maps`` (proc(5))."""

from __future__ import annotations

import bisect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..errors import Code, FailedError
from ..units import PAGE_SIZE
from .proc_files import beyond_limit, malformed

BackingKind = Literal["anonymous", "memfd", "shmem", "hugetlb", "file", "device"]
#: Maximum number of mappings of a process. The kernel's default limit is 65,530 (vm.max_map_count).
MAX_MAPPINGS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class MemoryMapping:
    """One mapping of a process, from one line of ``/proc/PID/maps``.

    At the addresses ``start..end-1``, the process has mapped the file at ``path``, starting at byte
    ``offset``.
    """

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def size(self) -> int:
        """The size of the mapping in bytes."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes to the memory also change the file (MAP_SHARED)."""
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        """Whether the process may write to the memory."""
        return self.perms[1] == "w"


_MAPPING: Final = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16}) "
    rb"([0-9a-f]{2,8}):([0-9a-f]{2,8}) ([0-9]{1,20}) *([^\0]*)",
)


def parse_maps(data: bytes) -> tuple[MemoryMapping, ...]:
    """Return the mappings in the content of ``/proc/PID/maps``.

    The content is bytes, because Python stores a text with one character beyond the Basic
    Multilingual Plane in four bytes per character.

    :raises FailedError: If a line has another format.
    """
    if data.count(b"\n") > MAX_MAPPINGS:
        raise beyond_limit(f"/proc/PID/maps has more than {MAX_MAPPINGS} mappings")
    # Most mappings share their file with other mappings.
    files: dict[bytes, str] = {}
    devices: dict[tuple[int, int], tuple[int, int]] = {}
    mappings = []
    for line in re.finditer(rb"[^\n]+", data):
        match = _MAPPING.fullmatch(line[0])
        if match is None or (end := int(match[2], 16)) <= (start := int(match[1], 16)):
            text = line[0][:480].decode("utf-8", "surrogateescape")
            raise malformed("a line of /proc/PID/maps", text)
        if (path := files.get(match[8])) is None:
            path = files[match[8]] = match[8].decode("utf-8", "surrogateescape")
        device = (int(match[5], 16), int(match[6], 16))
        mappings.append(
            MemoryMapping(
                start=start,
                end=end,
                perms=sys.intern(match[3].decode()),
                offset=int(match[4], 16),
                device=devices.setdefault(device, device),
                inode=int(match[7]),
                path=path,
            )
        )
    return tuple(mappings)


def backing_of(mapping: MemoryMapping, page_size: int = PAGE_SIZE) -> BackingKind:
    """Return the kind of memory behind a mapping.

    :param page_size: The page size of the backing in bytes, which the monitor reports
        (:attr:`MemorySection.page_size`). This parameter is necessary because the path of a memfd
        or a file does not show whether the file has huge pages.
    """
    path = mapping.path.removesuffix(" (deleted)")
    # An anonymous MAP_HUGETLB mapping is also a file with this name (fs/hugetlbfs/inode.c).
    if page_size > PAGE_SIZE or path.startswith(("/anon_hugepage", "/dev/hugepages/")):
        return "hugetlb"
    if mapping.inode == 0:
        return "anonymous"
    if path.startswith("/memfd:"):
        return "memfd"
    # This is a name in /proc/PID/maps, not a file that the tool opens.
    if path.startswith(("/dev/shm/", "/dev/zero", "/SYSV")):  # nosec B108
        return "shmem"
    if path.startswith("/dev/"):
        return "device"
    return "file"


def mappings_of(maps: Sequence[MemoryMapping], start: int, size: int) -> tuple[MemoryMapping, ...]:
    """Return the mappings that together cover ``start..start+size-1`` without a gap.

    :param maps: The mappings in the order of their addresses, as in ``/proc/PID/maps``.
    :raises FailedError: If a byte of this range is not mapped (code ``unmapped``).
    """
    first = bisect.bisect_right(maps, start, key=lambda mapping: mapping.end)
    after = bisect.bisect_left(maps, start + size, lo=first, key=lambda mapping: mapping.start)
    found = tuple(maps[first:after])
    reached = start
    for mapping in found:
        if mapping.start > reached:
            break
        reached = mapping.end
    if reached < start + size:
        raise FailedError(
            f"QEMU has no mapping at {reached:#x}, although its monitor reports guest RAM at this "
            "address",
            "run qemu-prefault again, because the memory layout may have changed",
            code=Code.UNMAPPED,
        )
    return found
