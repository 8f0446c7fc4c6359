# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that check the access rights of leaves for each kind of host memory.

The ioctl simulates a *read* fault. KVM therefore maps a page read-only if the page is not writable
in the host's page table. KVM's counters do not distinguish read-only leaves from writable leaves.
The cases distinguish them by the faults that the guest's first write takes.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import needs
from ..expectations import expect, expect_equal
from ..memory import (
    COLLAPSE,
    MERGEABLE,
    POPULATE_READ,
    Memory,
    file_private,
    hugetlb,
    memfd,
    memfd_with_contents,
    small,
    thp,
)
from ..suite import Need, Skip, add, case
from ..threads import wait_for
from .common import GPA, PAGES, expect_mapped, expect_reads, expect_writes, make_fixture

SMALL = PAGES * PAGE_SIZE
RULE = "mmu/mmu.c:kvm_tdp_map_page(), virt/kvm/kvm_main.c:hva_to_pfn_slow() (map_writable)"


#: A writable leaf: the guest's write takes no fault.
FREE = 0
#: A read-only leaf: the guest's write takes one fault, which makes the leaf writable.
UPGRADED = 1
#: A read-only leaf of a page that the host must copy first. The copy calls KVM's mmu notifier, so
#: the fault that caused the copy is stale, and the guest takes a second fault.
COPIED = 2
_COPY = (
    "mm/memory.c:wp_page_copy() calls the notifier; mmu/mmu.c:is_page_fault_stale() detects this"
)


@dataclass(frozen=True)
class MemoryKind:
    """A kind of host memory, and the expected result of a prefault of this memory.

    :ivar touched: How the host accesses the memory before the prefault.
    :ivar make: A function that allocates the memory, accesses it and returns it.
    :ivar cost: The number of stage-2 faults that the guest's first write to each leaf takes.
    :ivar leaf: The size of the leaves in bytes.
    :ivar settled: False if the host (KSM) can replace pages while the guest writes to these pages.
    """

    name: str
    touched: str
    make: Callable[[], Memory]
    cost: int
    leaf: int = PAGE_SIZE
    needs: tuple[Need, ...] = ()
    source: str = RULE
    settled: bool = True

    def leaves(self, memory: Memory) -> Stage2Leaves:
        count = memory.size // self.leaf
        return Stage2Leaves(count) if self.leaf == PAGE_SIZE else Stage2Leaves(0, count)


def touched(memory: Memory, *what: str) -> Memory:
    for action in what:
        getattr(memory, action)()
    return memory


def populated_for_reading(memory: Memory) -> Memory:
    memory.advise(POPULATE_READ)
    return memory


def _collapsed(size: int) -> Memory:
    memory = memfd(size)
    memory.write()
    try:
        memory.advise(COLLAPSE)
    except OSError as error:
        raise Skip(f"MADV_COLLAPSE failed on a memfd: {error.strerror}") from None
    return memory


def _shared_with_a_child(size: int) -> Memory:
    """Return memory that this process shares copy-on-write with a child process."""
    memory = touched(small(size), "write")
    child = os.fork()
    if child == 0:
        select.select([], [], [])
    return memory


def _merged(size: int) -> Memory:
    """Return memory whose pages have equal contents, after KSM has merged them."""
    memory = small(size)
    for offset in range(0, size, PAGE_SIZE):
        memory.put(offset, b"the same everywhere")
    memory.advise(MERGEABLE)
    merged = Path("/proc/self/ksm_merging_pages")
    if not merged.exists():
        raise Skip("this kernel has no /proc/PID/ksm_merging_pages")
    wait_for(
        lambda: int(merged.read_text()) >= size // PAGE_SIZE, "KSM did not merge the pages", 30
    )
    return memory


def _soft_clean(size: int) -> Memory:
    """Return written memory that soft-dirty tracking has write-protected."""
    memory = touched(small(size), "write")
    entry = 8 * (memory.address // PAGE_SIZE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        dirty = os.pread(pagemap.fileno(), 8, entry)[6] & 0x80
        Path("/proc/self/clear_refs").write_text("4")
        if not dirty or os.pread(pagemap.fileno(), 8, entry)[6] & 0x80:
            raise Skip("this kernel has no soft-dirty tracking")
    return memory


_ZERO_PAGE = "mm/memory.c:do_anonymous_page(): a read fault maps the zero page"
_COW = "mm/memory.c:do_read_fault() maps the page cache's page read-only in a private mapping"
_HUGETLB = "mm/hugetlb.c:hugetlb_no_page() write-protects the page if the mapping is private"

MEMORY_KINDS = (
    MemoryKind("4k", "untouched", lambda: small(SMALL), COPIED, source=_ZERO_PAGE),
    MemoryKind("4k", "read", lambda: touched(small(SMALL), "read"), COPIED, source=_ZERO_PAGE),
    MemoryKind("4k", "written", lambda: touched(small(SMALL), "write"), FREE),
    MemoryKind("4k", "populated", lambda: touched(small(SMALL), "populate"), FREE),
    MemoryKind("4k", "populated-read", lambda: populated_for_reading(small(SMALL)), COPIED,
            source=_ZERO_PAGE),
    MemoryKind("4k", "read-then-populated", lambda: touched(small(SMALL), "read", "populate"),
            FREE),
    MemoryKind("thp", "written", lambda: touched(thp(HUGE_PAGE_SIZE), "write"), FREE,
            HUGE_PAGE_SIZE, (needs.transparent_huge_pages,)),
    MemoryKind("thp", "populated", lambda: touched(thp(2 * HUGE_PAGE_SIZE), "populate"), FREE,
            HUGE_PAGE_SIZE, (needs.transparent_huge_pages,)),
    MemoryKind("memfd", "untouched", lambda: memfd(SMALL), FREE,
            source="mm/memory.c:do_shared_fault(), mm/vma.c:vma_wants_writenotify(): shmem does "
                   "not need write notifications, so the kernel maps its pages writable"),
    MemoryKind("memfd", "read", lambda: touched(memfd(SMALL), "read"), FREE),
    MemoryKind("memfd", "written", lambda: touched(memfd(SMALL), "write"), FREE),
    MemoryKind("memfd", "populated", lambda: touched(memfd(SMALL), "populate"), FREE),
    MemoryKind("memfd", "in-page-cache", lambda: memfd_with_contents(SMALL, shared=True), FREE),
    MemoryKind("memfd-huge", "collapsed", lambda: _collapsed(HUGE_PAGE_SIZE), FREE,
            HUGE_PAGE_SIZE),
    MemoryKind("memfd-private", "untouched", lambda: memfd(SMALL, shared=False), COPIED,
            source=_COW),
    MemoryKind("memfd-private", "in-page-cache", lambda: memfd_with_contents(SMALL, shared=False),
            COPIED, source=_COW),
    MemoryKind("memfd-private", "written", lambda: touched(memfd(SMALL, shared=False), "write"),
            FREE),
    MemoryKind("memfd-private", "populated", lambda: touched(memfd(SMALL, shared=False),
            "populate"), FREE),
    MemoryKind("file-private", "untouched", lambda: file_private(SMALL), COPIED, source=_COW),
    MemoryKind("file-private", "read", lambda: touched(file_private(SMALL), "read"), COPIED,
            source=_COW),
    MemoryKind("file-private", "populated", lambda: touched(file_private(SMALL), "populate"), FREE),
    MemoryKind("hugetlb-shared", "untouched", lambda: hugetlb(HUGE_PAGE_SIZE, shared=True), FREE,
            HUGE_PAGE_SIZE, (needs.hugetlb_2m,), _HUGETLB),
    MemoryKind("hugetlb-shared", "written",
            lambda: touched(hugetlb(HUGE_PAGE_SIZE, shared=True), "write"), FREE, HUGE_PAGE_SIZE,
            (needs.hugetlb_2m,)),
    MemoryKind("hugetlb-private", "untouched", lambda: hugetlb(HUGE_PAGE_SIZE, shared=False),
            UPGRADED, HUGE_PAGE_SIZE, (needs.hugetlb_2m,), _HUGETLB),
    MemoryKind("hugetlb-private", "written",
            lambda: touched(hugetlb(HUGE_PAGE_SIZE, shared=False), "write"), FREE, HUGE_PAGE_SIZE,
            (needs.hugetlb_2m,)),
    MemoryKind("hugetlb-private", "populated",
            lambda: touched(hugetlb(HUGE_PAGE_SIZE, shared=False), "populate"), FREE,
            HUGE_PAGE_SIZE, (needs.hugetlb_2m,)),
    MemoryKind("4k", "cow-with-child", lambda: _shared_with_a_child(SMALL), COPIED,
            source="virt/kvm/kvm_main.c:hva_to_pfn(): a read does not break copy-on-write"),
    # KSM keeps running. It can merge a page again after the guest has written to it.
    MemoryKind("4k", "merged-by-ksm", lambda: _merged(SMALL), COPIED, needs=(needs.ksm,),
            settled=False),
    MemoryKind("4k", "soft-clean", lambda: _soft_clean(SMALL), UPGRADED,
            source="fs/proc/task_mmu.c:clear_soft_dirty() write-protects the page"),
)  # fmt: skip


def _prefault_then(kind: MemoryKind, writes: bool) -> None:
    memory = kind.make()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, memory.size)
    expect_mapped(fixture.vm, before, kind.leaves(memory))
    expect_reads(fixture.vcpu, memory, 0)
    if writes:
        faults = kind.cost * (memory.size // kind.leaf)
        if kind.settled:
            expect_writes(fixture.vcpu, memory, faults)
            expect_writes(fixture.vcpu, memory, 0, value=0x5A5A0001, first=0)
        else:
            taken = expect_writes(fixture.vcpu, memory, None)
            expect(taken >= faults, f"the guest took {taken} faults, expected at least {faults}")


_COSTS = ("no faults", "one fault per leaf", "two faults per leaf")

for kind in MEMORY_KINDS:
    entry = "read-only" if kind.cost else "writable"
    for writes, verb in ((False, "read"), (True, "write")):
        cost = _COSTS[kind.cost if writes else 0]
        size = "2 MiB" if kind.leaf == HUGE_PAGE_SIZE else "4 KiB"
        add(
            f"mapping/{kind.name}-{kind.touched}-{verb}",
            f"KVM maps {kind.name} memory ({kind.touched}) {entry} with {size} leaves, and the "
            f"guest's first {verb} takes {cost}",
            f"{kind.source}; {_COPY}" if writes and kind.cost == COPIED else kind.source,
            lambda kind=kind, writes=writes: _prefault_then(kind, writes),  # type: ignore[misc]
            *kind.needs,
            mapping=True,
        )


def _huge_zero_page(read_first: bool) -> str:
    memory = thp(HUGE_PAGE_SIZE)
    if read_first:
        memory.read(HUGE_PAGE_SIZE)
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    grown = fixture.vm.leaves() - before
    if grown != Stage2Leaves(0, 1):
        raise Skip(
            f"KVM mapped {grown} instead of the huge zero page (set "
            "/sys/kernel/mm/transparent_hugepage/use_zero_page to 1)"
        )
    fixture.vcpu.read(GPA, HUGE_PAGE_SIZE // PAGE_SIZE)
    faults = expect_writes(fixture.vcpu, memory, None)
    # Each page or huge page that the host must copy takes up to two faults: see COPIED.
    expect(
        faults in (1, 2, 512, 1024), f"the guest took {faults} faults, expected 1, 2, 512 or 1024"
    )
    kept = fixture.vm.leaves() - before
    return f"the guest takes {faults} faults to write 2 MiB; mapped afterwards: {kept}"


for read_first in (False, True):
    add(
        f"mapping/thp-{'read' if read_first else 'untouched'}-write",
        "KVM maps the huge zero page read-only for unwritten THP memory, and the guest's first "
        "write splits this page or allocates a new huge page",
        "mm/huge_memory.c:do_huge_pmd_wp_page() allocates a huge page since 1ced09e0331f",
        lambda read_first=read_first: _huge_zero_page(read_first),  # type: ignore[misc]
        needs.transparent_huge_pages,
        mapping=True,
    )


@case(
    "mapping/populate-after-the-zero-page",
    "if untouched THP memory is populated after a prefault, the kernel allocates 4 KiB pages or a "
    "huge page",
    "mm/huge_memory.c:do_huge_pmd_wp_page(); 1ced09e0331f",
    needs.transparent_huge_pages,
    mapping=True,
)
def populate_after_zero_page() -> str:
    fixture = make_fixture(thp(HUGE_PAGE_SIZE))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    fixture.memory.populate()
    # The mmu notifier has unmapped the huge zero page.
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    grown = fixture.vm.leaves() - before
    expect_equal(grown.bytes, HUGE_PAGE_SIZE, "bytes mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)
    return f"mapped as {grown}"
