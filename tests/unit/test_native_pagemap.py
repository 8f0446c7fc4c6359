# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the pagemap scanner on memory of this process and of a child process."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault._native import ffi, lib
from qemu_prefault.errors import FailedError
from qemu_prefault.host.pagemap import MERGE_DISTANCE, Pagemap
from qemu_prefault.host.procfs import Process

PAGE = 4096
MIB = 1 << 20
DEMOTE = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
PAGE_IS_PRESENT = 1 << 3

#: The first page and the number of pages of each range, relative to the start of the mapping.
Regions = list[tuple[int, int]]


def has_scan(fd: int) -> bool:
    """Return whether the kernel has PAGEMAP_SCAN, which can detect the zero page."""
    region = ffi.new("uint64_t[3]")
    vector = int(ffi.cast("uintptr_t", region))
    fields = (96, 0, 0, PAGE, 0, vector, 1, 0, 0, PAGE_IS_PRESENT, 0, PAGE_IS_PRESENT)
    try:
        fcntl.ioctl(fd, PAGEMAP_SCAN, struct.pack("12Q", *fields))
    except OSError:
        return False
    return True


class Area:
    """A mapping of this process, with its address and its memory."""

    def __init__(
        self, pages: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1
    ) -> None:
        self.pages = pages
        self.memory = mmap.mmap(fd, pages * PAGE, flags)
        self.start = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        if flags & mmap.MAP_ANONYMOUS:
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)

    def write(self, *pages: int) -> None:
        for page in pages:
            self.memory[page * PAGE] = 1

    def read(self, *pages: int) -> None:
        for page in pages:
            assert self.memory[page * PAGE] is not None


class Scanner:
    """The scanner's C functions, for a pagemap or a file that simulates a pagemap."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def sums(self, area: Area, private: bool = True) -> tuple[int, int]:
        """Return the numbers of present and of writable pages."""
        present, writable = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        end = area.start + area.pages * PAGE
        assert lib.pf_pagemap_sum(self.fd, area.start, end, private, present, writable) == 0
        return present[0] // PAGE, writable[0] // PAGE

    def writable(self, area: Area, private: bool = True, at_once: int = 64) -> Regions:
        regions = ffi.new("struct pagemap_region[]", at_once)
        reached, end = ffi.new("uint64_t *", area.start), area.start + area.pages * PAGE
        found: Regions = []
        while reached[0] < end:
            before = reached[0]
            count = lib.pf_pagemap_writable(
                self.fd, before, end, private, regions, at_once, reached
            )
            assert 0 <= count <= at_once
            assert reached[0] > before
            found += [
                ((regions[i].start - area.start) // PAGE, regions[i].size // PAGE)
                for i in range(count)
            ]
        return found


@pytest.fixture
def real() -> Iterator[Scanner]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield Scanner(fd)
    os.close(fd)


@pytest.fixture
def entries_only(real: Scanner) -> Iterator[Callable[[Area], Scanner]]:
    """Yield a function that copies pagemap entries to a plain file.

    A plain file does not support PAGEMAP_SCAN.
    """
    fd = os.memfd_create("pagemap")

    def copy(area: Area) -> Scanner:
        offset = area.start // PAGE * 8
        os.pwrite(fd, os.pread(real.fd, area.pages * 8, offset), offset)
        return Scanner(fd)

    yield copy
    os.close(fd)


@pytest.fixture(params=["PAGEMAP_SCAN", "entries"])
def scanner_of(
    request: pytest.FixtureRequest, real: Scanner, entries_only: Callable[[Area], Scanner]
) -> Callable[[Area], Scanner]:
    """Return a scanner that uses PAGEMAP_SCAN, or one that reads pagemap entries.

    The tests must pass with both scanners.
    """
    if request.param == "entries":
        return entries_only
    if not has_scan(real.fd):
        pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")
    return lambda area: real


ScannerOf = Callable[[Area], Scanner]


def test_zero_page_support_is_reported(real: Scanner, entries_only: ScannerOf) -> None:
    area = Area(1)
    assert not has_scan(entries_only(area).fd)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (6, 7):
        assert has_scan(real.fd)


def test_untouched_memory_is_absent(scanner_of: ScannerOf) -> None:
    area = Area(100)
    scanner = scanner_of(area)
    assert scanner.sums(area) == (0, 0)
    assert scanner.writable(area) == []


def test_written_memory_is_writable(scanner_of: ScannerOf) -> None:
    area = Area(100)
    area.write(0, 10, 11, 12, 99)
    scanner = scanner_of(area)
    assert scanner.sums(area) == (5, 5)
    assert scanner.writable(area) == [(0, 1), (10, 3), (99, 1)]


def test_zero_page_is_present_not_writable(real: Scanner) -> None:
    """Check that the zero page counts as present but not as writable.

    If it counted as writable, it would not be populated, and KVM_PRE_FAULT_MEMORY would map it
    read-only (hva_to_pfn_slow(), virt/kvm/kvm_main.c).
    """
    if not has_scan(real.fd):
        pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")
    area = Area(16)
    area.read(*range(8))
    area.write(3)
    assert real.sums(area) == (8, 1)
    assert real.writable(area) == [(3, 1)]


def test_private_file_is_writable_only_after_copy(scanner_of: ScannerOf, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"x" * (16 * PAGE))
        file.flush()
        area = Area(16, mmap.MAP_PRIVATE, file.fileno())
    area.read(*range(16))
    area.write(4, 5)
    scanner = scanner_of(area)
    assert scanner.sums(area) == (16, 2)
    assert scanner.writable(area) == [(4, 2)]


def test_shared_memory_is_writable_once_mapped(scanner_of: ScannerOf) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * PAGE)
    area = Area(16, mmap.MAP_SHARED, fd)
    os.pwrite(fd, b"x" * PAGE, 8 * PAGE)  # allocated but not mapped
    area.write(1, 2)
    scanner = scanner_of(area)
    assert scanner.sums(area, private=False) == (2, 2)
    assert scanner.writable(area, private=False) == [(1, 2)]
    os.close(fd)


def test_discarded_memory_is_absent(scanner_of: ScannerOf) -> None:
    area = Area(16)
    area.write(*range(16))
    area.memory.madvise(mmap.MADV_DONTNEED, 4 * PAGE, 8 * PAGE)
    assert scanner_of(area).writable(area) == [(0, 4), (12, 4)]


def test_huge_page_counts_in_full(scanner_of: ScannerOf) -> None:
    area = Area(4 * MIB // PAGE)
    area.memory.madvise(mmap.MADV_HUGEPAGE)
    first = -area.start % (2 * MIB) // PAGE
    area.write(first)
    scanner = scanner_of(area)
    present, writable = scanner.sums(area)
    if present == 1:
        pytest.skip("the kernel provided no transparent huge page")
    assert (present, writable) == (512, 512)
    assert scanner.writable(area) == [(first, 512)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64, 2000])
def test_fragmented_map_is_read_in_any_chunk_size(scanner_of: ScannerOf, at_once: int) -> None:
    """Check that each range is returned once if one call cannot return all ranges."""
    area = Area(3000)
    area.write(*range(1, 3000, 2))
    scanner = scanner_of(area)
    assert scanner.writable(area, at_once=at_once) == [(page, 1) for page in range(1, 3000, 2)]
    assert scanner.sums(area) == (1500, 1500)


def test_map_larger_than_one_read(scanner_of: ScannerOf) -> None:
    area = Area(20_000)
    area.write(0, 8191, 8192, 8193, 16383, 16384, 19_999)
    expected = [(0, 1), (8191, 3), (16383, 2), (19_999, 1)]
    found: Regions = []
    for start, count in scanner_of(area).writable(area):  # join ranges that one read has split
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((start, count))
    assert found == expected


def test_unmapped_address_is_absent(real: Scanner) -> None:
    area = Area(1)
    area.start, area.pages = 0x1000_0000_0000, 1000
    assert real.sums(area) == (0, 0)
    assert real.writable(area) == []


# --- the Python interface, on another process ---

VICTIM = """
import mmap, sys, ctypes
memory = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, 1024):
    memory[page << 12] = 1
memory[32 << 20] = 1
memory[48 << 20] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a process with 64 MiB of memory, and the memory's address.

    The process has written all of the first 4 MiB, a page at 32 MiB, and a page at 48 MiB.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def test_other_process(child: tuple[subprocess.Popen[str], int]) -> None:
    process, start = child
    with Pagemap(Process.find(process.pid)) as pagemap:
        sums = pagemap.sums(start, 64 * MIB, True)
        assert (sums.present, sums.writable) == (4 * MIB + 2 * PAGE,) * 2
        assert list(pagemap.writable(start, 64 * MIB, True)) == [
            (start, 4 * MIB),
            (start + 32 * MIB, PAGE),
            (start + 48 * MIB, PAGE),
        ]


def test_gaps_complement_ranges(child: tuple[subprocess.Popen[str], int]) -> None:
    process, start = child
    with Pagemap(Process.find(process.pid)) as pagemap:
        assert list(pagemap.unwritable(start, 4 * MIB, True)) == []
        assert list(pagemap.unwritable(start, 64 * MIB, True)) == [
            # Single pages between gaps are not excluded, so they are populated again.
            (start + 4 * MIB, 60 * MIB)
        ]
        assert list(pagemap.unwritable(start + 4 * MIB, 28 * MIB, True)) == [
            (start + 4 * MIB, 28 * MIB)
        ]


def test_distant_gaps_stay_separate() -> None:
    """Check that a large range between two gaps is excluded from populating."""
    island = MERGE_DISTANCE + 4 * PAGE
    area = Area((island + 2 * MIB) // PAGE)
    area.write(*range(256, 256 + island // PAGE))
    with Pagemap(Process.find(os.getpid())) as pagemap:
        assert list(pagemap.unwritable(area.start, area.pages * PAGE, True)) == [
            (area.start, MIB),
            (area.start + MIB + island, MIB),
        ]


def test_memory_use_is_constant() -> None:
    """Check that iterating over 25,000 ranges needs little memory."""
    area = Area(50_000)
    area.write(*range(0, 50_000, 2))
    with Pagemap(Process.find(os.getpid())) as pagemap:
        tracemalloc.start()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(1 for _ in pagemap.writable(area.start, area.pages * PAGE, True)) == 25_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096


def test_exited_process_is_named(child: tuple[subprocess.Popen[str], int]) -> None:
    process, start = child
    with Pagemap(Process.find(process.pid)) as pagemap:
        process.kill()
        process.wait()
        with pytest.raises(FailedError, match=f"{process.pid} has exited"):
            pagemap.sums(start, 64 * MIB, True)
        with pytest.raises(FailedError, match=f"{process.pid} has exited"):
            list(pagemap.writable(start, 64 * MIB, True))
    with pytest.raises(FailedError, match=f"{process.pid} has exited"):
        Pagemap(Process.find(process.pid))


def test_process_without_memory_has_exited(
    child: tuple[subprocess.Popen[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the error while the kernel has freed the memory, but not the process."""
    process, start = child
    with Pagemap(Process.find(process.pid)) as pagemap:
        process.kill()
        process.wait()
        monkeypatch.setattr(Process, "check", lambda self: None)
        with pytest.raises(FailedError, match=f"{process.pid}\\) has exited") as caught:
            if not pagemap.sums(start, 64 * MIB, True).present:
                pytest.skip("PAGEMAP_SCAN of this kernel reports the memory as empty")
    assert caught.value.code == "qemu-gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_unreadable_pagemap_names_the_reason(
    child: tuple[subprocess.Popen[str], int],
) -> None:
    program = (
        "import sys; from qemu_prefault.host.pagemap import Pagemap\n"
        "from qemu_prefault.host.procfs import Process\n"
        "from qemu_prefault.errors import UnsupportedError\n"
        "try: Pagemap(Process.find(int(sys.argv[1])))\n"
        "except UnsupportedError as error: print(error.code, error.cause, error.remedy)"
    )
    done = subprocess.run(
        [*DEMOTE, sys.executable, "-c", program, str(child[0].pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named" in done.stderr or "ermission denied" in done.stderr:
        pytest.skip("an unprivileged user cannot run this Python")
    assert done.stdout.startswith("ptrace-denied ")
    assert "uid 0" in done.stdout and "sudo" in done.stdout
