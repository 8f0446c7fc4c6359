# SPDX-License-Identifier: GPL-2.0-or-later
"""Read and write the control page of a helper thread in QEMU.

native/ptrace/control_page.h defines the fields of the control page. QEMU can overwrite or unmap the
page at any time. Therefore all values are untrusted. This module limits ids, signals, errnos and
sizes. The times and ``batch_done`` may have any value, which the callers must expect.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from .._native import ffi, lib
from ..host.bounded import pread_bounded
from ..host.mappings import MemoryMapping
from ..host.procfs import Process
from ..units import PAGE_SIZE
from .base import MAX_ERRNO, Outcome, Range
from .gadgets import AREAS_FROM, AREAS_TO, round_to_pages

#: Size of a helper's stack, in bytes. A signal frame with AMX state uses 11 KiB of the stack.
STACK_BYTES = 32 << 10


#: The signals that a helper can use for its tick (SIGNAL_LOWEST and SIGNAL_HIGHEST in
#: native/ptrace/helper.c).
TICK_SIGNALS = range(40, 65)
#: The highest thread id (PID_MAX_LIMIT, include/linux/threads.h).
MAX_TID = 1 << 22


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a control page that a helper, the kernel and the run gate write.

    :ivar tid: The helper's thread id in QEMU's pid namespace, or 0 if the value is not an id.
    :ivar ready: 0 if the helper is starting, 1 if it runs, otherwise a negative errno. The value is
        -EPROTO if the field has another value.
    :ivar tick_signal: The signal that interrupts the helper's system calls, or 0 for any signal
        that is not in :data:`TICK_SIGNALS`.
    :ivar batch_done: The number of the last batch that the helper has completed.
    :ivar batch_started_ns: A time of QEMU's CLOCK_MONOTONIC, as are the following fields.
    :ivar chunk_started_ns: The start of the current chunk. Each chunk changes this value.
    :ivar batch_finished_ns: The end of the last batch.
    :ivar vcpu_runs: Whether the run gate has ended the helper's work.
    """

    tid: int
    ready: int
    tick_signal: int
    batch_done: int
    batch_started_ns: int
    chunk_started_ns: int
    batch_finished_ns: int
    vcpu_runs: bool

    @classmethod
    def parse(cls, page: bytes) -> Header:
        """Return the fields of a control page.

        :raises OSError: If the data is not a control page.
        """
        raw = ffi.new("struct prefault_control *")
        ffi.memmove(raw, page, min(len(page), offset_of("ranges")))
        if raw.magic != lib.PREFAULT_CONTROL_MAGIC:
            raise OSError(errno.EIO, "the page is no longer a control page")
        ready = int(raw.ready)
        if ready > 1:
            ready -= 1 << 32
        return cls(
            tid=int(raw.tid) if raw.tid <= MAX_TID else 0,
            ready=ready if -MAX_ERRNO <= ready <= 1 else -errno.EPROTO,
            tick_signal=int(raw.tick_signal) if raw.tick_signal in TICK_SIGNALS else 0,
            batch_done=int(raw.batch_done),
            batch_started_ns=int(raw.batch_started_ns),
            chunk_started_ns=int(raw.chunk_started_ns),
            batch_finished_ns=int(raw.batch_finished_ns),
            vcpu_runs=bool(raw.vcpu_runs),
        )


class Helper:
    """One helper thread in QEMU, and its control page.

    :param memory: A file descriptor for QEMU's /proc/PID/mem.
    :param area: The address of the helper's mapping in QEMU.
    :param code_size: The size in bytes of the code that precedes the control page in the mapping.
    """

    def __init__(self, memory: int, area: int, code_size: int) -> None:
        self._memory = memory
        self.area = area
        self.control = area + code_size
        self.batch = 0
        self.thread_id = 0  # in this process's pid namespace, or 0 if unknown

    def read_header(self) -> Header:
        """Return the fields of the control page that the helper writes.

        :raises OSError: If the page is no longer mapped, or is not a control page.
        """
        return Header.parse(pread_bounded(self._memory, offset_of("ranges"), self.control))

    def is_there(self) -> bool:
        """Return whether the control page is mapped.

        A helper unmaps its control page before it exits.
        """
        try:
            self.read_header()
        except OSError:
            return False
        return True

    def write_word(self, field: str, value: int) -> None:
        """Write a value to one field of the control page."""
        size = 8 if field == "heartbeat" else 4
        os.pwrite(self._memory, value.to_bytes(size, "little"), self.control + offset_of(field))

    def submit(self, ranges: Sequence[Range]) -> None:
        """Start a batch of ranges by writing the ranges to the control page."""
        array = ffi.new("struct prefault_range[]", max(len(ranges), 1))
        for slot, item in zip(array, ranges, strict=False):
            slot.kind, slot.start, slot.size = item.kind, item.start, item.size
        data = ffi.buffer(array, len(ranges) * ffi.sizeof("struct prefault_range"))
        os.pwrite(self._memory, data, self.control + offset_of("ranges"))
        self.write_word("range_count", len(ranges))
        self.batch += 1
        self.write_word("batch", self.batch)

    def outcomes(self, ranges: Sequence[Range]) -> tuple[Outcome, ...]:
        """Return the current outcome of each range in the batch.

        :param ranges: The ranges that were passed to the last call to :meth:`submit`.
        """
        size = ffi.sizeof("struct prefault_range")
        array = ffi.new("struct prefault_range[]", max(len(ranges), 1))
        at = self.control + offset_of("ranges")
        data = pread_bounded(self._memory, len(ranges) * size, at)
        ffi.memmove(array, data, len(data))
        return tuple(
            Outcome(item, _clamped_size(slot.done, item.size), _clamped_errno(slot.error))
            for slot, item in zip(array, ranges, strict=False)
        )


def _clamped_size(done: int, size: int) -> int:
    """Return a number of whole pages in bytes, which is at most ``size``."""
    return size if done >= size else int(done) // PAGE_SIZE * PAGE_SIZE


def _clamped_errno(number: int) -> int:
    """Return an errno, or EPROTO if the number is not one."""
    return int(number) if 0 <= number <= MAX_ERRNO else errno.EPROTO


def offset_of(field: str) -> int:
    """Return the offset of a field of the control page, in bytes."""
    return int(ffi.offsetof("struct prefault_control", field))


CODE_SIZE = round_to_pages(len(ffi.buffer(lib.helper_blob)))
CONTROL_SIZE = round_to_pages(ffi.sizeof("struct prefault_control"))
AREA_SIZE = CODE_SIZE + CONTROL_SIZE + STACK_BYTES


def abandoned_areas(
    process: Process, memory: int, maps: Sequence[MemoryMapping]
) -> tuple[int, ...]:
    """Return the addresses of the helpers' mappings that have no helper thread.

    Such a mapping remains in QEMU if qemu-prefault is killed and clone() then fails. The kernel
    writes the thread id of a new helper to the helper's control page before the helper runs.
    Therefore the control page of an abandoned mapping contains no thread id.

    If any QEMU thread is traced, the result is empty. In this case, another qemu-prefault may have
    created a mapping whose helper does not exist yet.
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
