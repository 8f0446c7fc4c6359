# SPDX-License-Identifier: GPL-2.0-or-later
"""Find QEMU's present pages, and the pages that KVM would map writable.

KVM's prefault ioctl causes a read fault. KVM then maps a page writable only if the page is writable
in QEMU's own page tables.

native/common/pagemap.c reads the page tables. The iterators read a limited number of regions at a
time. Therefore memory use does not grow with the size of the guest.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from .._native import ffi, lib
from ..errors import FailedError
from .kernel_log import exit_error
from .procfs import Process
from .ptrace_access import ptrace_denied

#: Maximum number of regions that one call into native code returns.
REGIONS_AT_ONCE = 256
#: Maximum distance in bytes between two unwritable regions that one system call populates together.
#: Populating a present page again is cheap, but a system call for each region of a fragmented
#: mapping is expensive.
MERGE_DISTANCE = 2 << 20


@dataclass(frozen=True, slots=True)
class Sums:
    """The amounts of present memory and writable memory in a range, in bytes.

    :ivar present: The bytes that are present in the process's page tables.
    :ivar writable: The present bytes that a KVM read fault maps writable.
    """

    present: int
    writable: int


class Pagemap:
    """A context manager that reads QEMU's ``/proc/PID/pagemap``.

    :raises UnsupportedError: If this process has no permission to trace QEMU. The kernel requires
        this permission to open the file.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        try:
            self._fd = os.open(f"{process.proc}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
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
        """Return the numbers of present bytes and of writable bytes in a range.

        :param start: The host virtual address at which the range starts.
        :param size: The size of the range in bytes.
        :param private: Whether the mapping is private. The kernel copies a file page of a private
            mapping on write.
        """
        present, writable = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        self._check(
            lib.pf_pagemap_sum(self._fd, start, start + size, private, present, writable), start
        )
        if not present[0]:
            self._check_alive()
        return Sums(present[0], writable[0])

    def writable(self, start: int, size: int, private: bool) -> Iterator[tuple[int, int]]:
        """Yield the regions that a KVM read fault maps writable, in ascending order.

        A region is a pair of a host virtual address and a size in bytes. The parameters are those
        of :meth:`sums`.
        """
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
        """Yield the regions that must be populated, in ascending order.

        A region is a pair of a host virtual address and a size in bytes. The parameters are those
        of :meth:`sums`. Two regions are merged if the writable memory between them is not larger
        than :data:`MERGE_DISTANCE`.
        """
        reached = pending_end = start
        pending_start: int | None = None
        ends = itertools.chain(self.writable(start, size, private), [(start + size, 0)])
        for island, length in ends:
            if island > reached:  # the pages before this writable region are not writable
                if pending_start is None or reached - pending_end > MERGE_DISTANCE:
                    if pending_start is not None:
                        yield pending_start, pending_end - pending_start
                    pending_start = reached
                pending_end = island
            reached = island + length
        if pending_start is not None:
            yield pending_start, pending_end - pending_start

    def _check_alive(self) -> None:
        """Raise an error if the process has exited.

        Unlike read(), PAGEMAP_SCAN reports the memory of an exited process as empty, because
        ``do_pagemap_cmd()`` (fs/proc/task_mmu.c) does not check whether the address space is in
        use.
        """
        self._process.check()

    def _check(self, result: int, start: int) -> None:
        if result < 0:
            self._process.check()
            if result == -errno.ESRCH:  # the kernel has freed the memory of an exiting process
                raise exit_error(self._process, f"QEMU (pid {self._process.pid}) has exited")
            raise FailedError(
                f"qemu-prefault could not read QEMU's page map at {start:#x}: "
                f"{os.strerror(-result)}",
                "run qemu-prefault again, because the memory layout may have changed",
            )
