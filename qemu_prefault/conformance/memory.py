# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds of host memory and the operations on them."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from .._native import ffi, lib
from ..units import HUGE_PAGE_SIZE, PAGE_SIZE

_MMAP, _MPROTECT, _MUNMAP, _MADVISE, _USERFAULTFD = 9, 10, 11, 28, 323

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
READ_WRITE = PROT_READ | PROT_WRITE
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 1, 2, 0x10, 0x20
_MAP_NORESERVE, _MAP_HUGETLB = 0x4000, 0x40000
HUGETLB_2M, HUGETLB_1G = _MAP_HUGETLB | 21 << 26, _MAP_HUGETLB | 30 << 26

DONTNEED, MERGEABLE, WITH_HUGEPAGES, WITHOUT_HUGEPAGES = 4, 12, 14, 15
POPULATE_READ, POPULATE_WRITE, COLLAPSE, HWPOISON = 22, 23, 25, 100


def system_call(number: int, *arguments: int) -> int:
    """Make a system call and return its result.

    :raises OSError: If the system call fails.
    """
    answer = int(lib.pf_vmm_syscall(number, *arguments, *[0] * (6 - len(arguments))))
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return answer


class Memory:
    """A memory mapping of this process, aligned to ``align`` bytes.

    :ivar address: The host virtual address.
    :ivar size: The size in bytes.
    """

    def __init__(
        self,
        size: int,
        *,
        shared: bool = False,
        fd: int = -1,
        protection: int = READ_WRITE,
        flags: int = 0,
        align: int = HUGE_PAGE_SIZE,
    ) -> None:
        self.size = size
        self.fd = fd
        self.shared = shared
        reserve = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        start = system_call(_MMAP, 0, size + align, PROT_NONE, reserve, 2**64 - 1, 0)
        self.address = (start + align - 1) & -align
        flags |= _MAP_FIXED | (_MAP_SHARED if shared else _MAP_PRIVATE)
        flags |= _MAP_ANONYMOUS if fd < 0 else 0
        system_call(_MMAP, self.address, size, protection, flags, fd & 2**64 - 1, 0)
        self._bytes = ffi.buffer(ffi.cast("char *", self.address), size)

    def advise(self, advice: int, offset: int = 0, size: int | None = None) -> None:
        system_call(_MADVISE, self.address + offset, self._rest(offset, size), advice)

    def protect(self, protection: int, offset: int = 0, size: int | None = None) -> None:
        system_call(_MPROTECT, self.address + offset, self._rest(offset, size), protection)

    def unmap(self, offset: int = 0, size: int | None = None) -> None:
        system_call(_MUNMAP, self.address + offset, self._rest(offset, size))

    def _rest(self, offset: int, size: int | None) -> int:
        return self.size - offset if size is None else size

    def put(self, offset: int, data: bytes) -> None:
        self._bytes[offset : offset + len(data)] = data

    def get(self, offset: int, size: int) -> bytes:
        return bytes(self._bytes[offset : offset + size])

    def word(self, offset: int) -> int:
        """Return the 32-bit word at an offset in bytes."""
        return int(struct.unpack_from("<I", self._bytes, offset)[0])

    def words(self, stride: int = PAGE_SIZE) -> list[int]:
        """Return the 32-bit words at all multiples of ``stride`` bytes."""
        return [self.word(offset) for offset in range(0, self.size, stride)]

    def write(self, stride: int = PAGE_SIZE) -> None:
        """Write a different 32-bit word at each multiple of ``stride`` bytes."""
        for offset in range(0, self.size, stride):
            self.put(offset, struct.pack("<I", 0x1000 + offset // PAGE_SIZE))

    def read(self, stride: int = PAGE_SIZE) -> None:
        """Read the 32-bit word at each multiple of ``stride`` bytes."""
        self.words(stride)

    def populate(self) -> None:
        """Make every page present and writable, as qemu-prefault does."""
        self.advise(POPULATE_WRITE)


def small(size: int) -> Memory:
    """Return anonymous memory with 4 KiB pages."""
    memory = Memory(size)
    memory.advise(WITHOUT_HUGEPAGES)
    return memory


def thp(size: int) -> Memory:
    """Return anonymous memory that is advised with MADV_HUGEPAGE."""
    memory = Memory(size)
    memory.advise(WITH_HUGEPAGES)
    return memory


def memfd(size: int, *, shared: bool = True) -> Memory:
    fd = os.memfd_create("guest")
    os.truncate(fd, size)
    return Memory(size, fd=fd, shared=shared)


def memfd_with_contents(size: int, *, shared: bool) -> Memory:
    """Return an untouched mapping of a memfd whose pages are in the page cache."""
    source = memfd(size)
    source.write()
    return Memory(size, fd=source.fd, shared=shared)


def file_private(size: int) -> Memory:
    """Return a private mapping of this process's C library file."""
    path = next(
        line.split(None, 5)[5]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libc" in line
    )
    fd = os.open(path.strip(), os.O_RDONLY | os.O_CLOEXEC)
    return Memory(min(size, os.fstat(fd).st_size & -PAGE_SIZE), fd=fd)


def hugetlb(size: int, *, shared: bool, page: int = HUGETLB_2M) -> Memory:
    align = 1 << (page >> 26)
    return Memory(size, shared=shared, flags=page, align=align)


_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_ZEROPAGE = 0xC020AA04
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFD_MISSING, _UFFD_WP = 1, 2
_UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1


class Userfault:
    """A userfaultfd for a memory mapping.

    A thread that accesses a missing page waits until :meth:`resolve` maps the page.

    :param write_protect: True if a thread waits at a write to a write-protected page, instead of at
        an access to a missing page.
    """

    def __init__(self, memory: Memory, *, write_protect: bool = False) -> None:
        self.memory = memory
        self.fd = system_call(_USERFAULTFD, os.O_CLOEXEC)
        feature = _UFFD_FEATURE_PAGEFAULT_FLAG_WP if write_protect else 0
        self._call(_UFFDIO_API, struct.pack("<3Q", 0xAA, feature, 0))
        mode = _UFFD_WP if write_protect else _UFFD_MISSING
        span = (memory.address, memory.size)
        self._call(_UFFDIO_REGISTER, struct.pack("<4Q", *span, mode, 0))

    def _call(self, request: int, data: bytes) -> None:
        buffer = ffi.new("char[]", data)
        answer = lib.pf_vmm_ioctl(self.fd, request, int(ffi.cast("uintptr_t", buffer)))
        if answer < 0 and answer != -errno.EEXIST:
            raise OSError(-answer, f"userfaultfd: {os.strerror(-answer)}")

    def protect(self, on: bool = True) -> None:
        span = (self.memory.address, self.memory.size)
        self._call(_UFFDIO_WRITEPROTECT, struct.pack("<3Q", *span, 1 if on else 0))

    def wait(self) -> int:
        """Wait for a fault, and return the offset of the faulting page in bytes."""
        message = os.read(self.fd, 32)
        return int(struct.unpack_from("<Q", message, 16)[0] & -PAGE_SIZE) - self.memory.address

    def resolve(self, offset: int, size: int = PAGE_SIZE) -> None:
        """Map zero-filled pages and wake the threads that wait for them."""
        start = self.memory.address + offset
        self._call(_UFFDIO_ZEROPAGE, struct.pack("<4Q", start, size, 0, 0))


def offsets(size: int, stride: int = PAGE_SIZE) -> Iterator[int]:
    yield from range(0, size, stride)
