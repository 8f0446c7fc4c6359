# SPDX-License-Identifier: GPL-2.0-or-later
"""Access a helper's control page (native/ptrace/control_page.h) in QEMU."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Sequence
from typing import Any

from .._native import ffi, lib
from ..host.procfs import MemoryMapping, Process
from .base import Outcome, Range
from .gadgets import AREAS_FROM, AREAS_TO, round_to_pages

#: Size of a helper's stack, in bytes. A signal frame with AMX state uses 11 KiB of the stack.
STACK_BYTES = 32 << 10


class Helper:
    """The control page of one helper thread in QEMU.

    :param memory: A descriptor of QEMU's /proc/PID/mem.
    :param area: The address of the helper's mapping in QEMU.
    :param code_size: The bytes of code before the control page.
    """

    def __init__(self, memory: int, area: int, code_size: int) -> None:
        self._memory = memory
        self.area = area
        self.control = area + code_size
        self.batch = 0
        self.thread_id = 0  # in this process's pid namespace, or 0 if unknown

    def read_header(self) -> Any:
        """Return the control page's fields before the ranges.

        :raises OSError: The page is no longer mapped, or is not a control page.
        """
        header = ffi.new("struct prefault_control *")
        data = os.pread(self._memory, offset_of("ranges"), self.control)
        ffi.memmove(header, data, len(data))
        if header.magic != lib.PREFAULT_CONTROL_MAGIC:
            raise OSError(errno.EIO, "no longer a control page")
        return header

    def is_there(self) -> bool:
        """Return whether the page is mapped. A helper unmaps the page before it exits."""
        try:
            self.read_header()
        except OSError:
            return False
        return True

    def write_word(self, field: str, value: int) -> None:
        """Write one field of the control page."""
        size = 8 if field == "heartbeat" else 4
        os.pwrite(self._memory, value.to_bytes(size, "little"), self.control + offset_of(field))

    def submit(self, ranges: Sequence[Range]) -> None:
        """Write a batch of ranges to the page, so that the helper starts the batch."""
        array = ffi.new("struct prefault_range[]", max(len(ranges), 1))
        for slot, item in zip(array, ranges, strict=False):
            slot.kind, slot.start, slot.size = item.kind, item.start, item.size
        data = ffi.buffer(array, len(ranges) * ffi.sizeof("struct prefault_range"))
        os.pwrite(self._memory, data, self.control + offset_of("ranges"))
        self.write_word("range_count", len(ranges))
        self.batch += 1
        self.write_word("batch", self.batch)

    def outcomes(self, ranges: Sequence[Range]) -> tuple[Outcome, ...]:
        """Return the outcomes so far.

        :param ranges: The ranges of the last :meth:`submit`.
        """
        size = ffi.sizeof("struct prefault_range")
        array = ffi.new("struct prefault_range[]", max(len(ranges), 1))
        data = os.pread(self._memory, len(ranges) * size, self.control + offset_of("ranges"))
        ffi.memmove(array, data, len(data))
        return tuple(
            Outcome(item, min(slot.done, item.size), slot.error)
            for slot, item in zip(array, ranges, strict=False)
        )


def offset_of(field: str) -> int:
    """Return the offset of a field in the control page, in bytes."""
    return int(ffi.offsetof("struct prefault_control", field))


CODE_SIZE = round_to_pages(len(ffi.buffer(lib.helper_blob)))
CONTROL_SIZE = round_to_pages(ffi.sizeof("struct prefault_control"))
AREA_SIZE = CODE_SIZE + CONTROL_SIZE + STACK_BYTES


def abandoned_areas(
    process: Process, memory: int, maps: Sequence[MemoryMapping]
) -> tuple[int, ...]:
    """Return the addresses of helper mappings that have no helper.

    Such a mapping remains if clone() fails after the tool was killed. Its control page has no
    thread id: the kernel writes a helper's thread id to the page before the helper runs. While
    another run starts a helper, that run traces a thread of QEMU. In this case, the result is
    empty.
    """
    candidates = [
        first.start
        for first, second in itertools.pairwise(maps)
        if AREAS_FROM <= first.start < AREAS_TO
        and (first.perms, first.size, second.perms) == ("r-xp", CODE_SIZE, "rw-p")
        and (second.start, second.size) == (first.end, AREA_SIZE - CODE_SIZE)
    ]
    if not candidates or any(process.status(tid).tracer_pid for tid in process.threads()):
        return ()
    found = []
    for area in candidates:
        with contextlib.suppress(OSError):
            if not Helper(memory, area, CODE_SIZE).read_header().tid:
                found.append(area)
    return tuple(found)
