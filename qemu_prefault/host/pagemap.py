# SPDX-License-Identifier: GPL-2.0-or-later
"""What of QEMU's memory is present, and what KVM's read fault would map writable.

The work is done by native/common/pagemap.c; regions are handed out one by one, so memory use does
not grow with the guest.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from .._native import ffi, lib
from ..errors import FailedError
from .procfs import Process
from .ptrace_access import ptrace_denied

REGIONS_AT_ONCE = 256
MERGE_DISTANCE = 2 << 20
"""Populating a page twice is cheap; a system call for each gap of a fragmented map is not."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Bytes ``present`` in the process's page tables; of these, ``writable`` at a read fault."""

    present: int
    writable: int


class Pagemap:
    """``/proc/PID/pagemap`` of QEMU; a context manager.

    :raise UnsupportedError: it may not be read (the right to trace QEMU is needed).
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        try:
            self._fd = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise ptrace_denied(process) from None
        except OSError:
            process.check()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def sums(self, start: int, size: int, private: bool) -> Sums:
        """Sum up ``size`` bytes from host virtual address ``start``."""
        present, writable = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        self._check(
            lib.pf_pagemap_sum(self._fd, start, start + size, private, present, writable), start
        )
        if not present[0]:
            self._check_alive()
        return Sums(present[0], writable[0])

    def writable(self, start: int, size: int, private: bool) -> Iterator[tuple[int, int]]:
        """Regions (start, size) in bytes that a read fault of KVM maps writable, ascending."""
        regions = ffi.new("struct pagemap_region[]", REGIONS_AT_ONCE)
        reached, end = ffi.new("uint64_t *", start), start + size
        found = False
        while reached[0] < end:
            count = lib.pf_pagemap_writable(
                self._fd, reached[0], end, private, regions, REGIONS_AT_ONCE, reached
            )
            self._check(count, start)
            found |= count > 0
            for index in range(count):
                yield regions[index].start, regions[index].size
        if not found:
            self._check_alive()

    def unwritable(self, start: int, size: int, private: bool) -> Iterator[tuple[int, int]]:
        """The rest: regions that have to be populated. Small islands between are included."""
        reached = pending_end = start
        pending_start: int | None = None
        ends = itertools.chain(self.writable(start, size, private), [(start + size, 0)])
        for island, length in ends:
            if island > reached:  # a gap lies before this island
                if pending_start is None or reached - pending_end > MERGE_DISTANCE:
                    if pending_start is not None:
                        yield pending_start, pending_end - pending_start
                    pending_start = reached
                pending_end = island
            reached = island + length
        if pending_start is not None:
            yield pending_start, pending_end - pending_start

    def _check_alive(self) -> None:
        """Nothing was found: PAGEMAP_SCAN, unlike read(), finds an exited process's memory empty.

        do_pagemap_cmd(), fs/proc/task_mmu.c, does not ask whether the address space is in use.
        """
        self._process.check()

    def _check(self, result: int, start: int) -> None:
        if result < 0:
            self._process.check()
            raise FailedError(
                f"QEMU's page map at {start:#x} could not be read: {os.strerror(-result)}",
                "the memory layout may have changed meanwhile: try again",
            )
