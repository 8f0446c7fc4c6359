# SPDX-License-Identifier: GPL-2.0-or-later
"""Is it really mapped, and may it be written? Backing x what was touched x what the guest does.

The ioctl is a *read* fault: it maps what the host's page table has, and a page that is not
writable there is mapped read-only. No counter tells read-only from writable, but the guest
does: its first write to a read-only leaf is a fault.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE
from .. import abi, guest_code, needs
from ..guest_code import WRITE_32
from ..memory import (
    COLLAPSE,
    MERGEABLE,
    POPULATE_READ,
    PROT_READ,
    Memory,
    Userfault,
    file_private,
    hugetlb,
    memfd,
    memfd_with_contents,
    small,
    system_call,
    thp,
)
from ..suite import Need, Skip, add, case
from ..vmm import LONG64, BackgroundCall, KvmVm, expect, expect_equal, wait_for
from .common import GPA, PAGES, SLOT, expect_mapped, expect_reads, expect_writes, make_fixture

SMALL = PAGES * PAGE_SIZE
_RULE = "mmu/mmu.c:kvm_tdp_map_page(), virt/kvm/kvm_main.c:hva_to_pfn_slow() (map_writable)"


FREE = 0
UPGRADED = 1
"""A read-only leaf: the write is a fault, which makes it writable."""
COPIED = 2
"""A read-only leaf of a page that has to be copied first. The copy calls KVM's mmu notifier, so
the fault that caused it finds itself stale, and is taken a second time."""
_COPY = "mm/memory.c:wp_page_copy() calls the notifier; mmu/mmu.c:is_page_fault_stale() retries"


@dataclass(frozen=True)
class MemoryKind:
    """A kind of memory, and what becomes of it.

    :ivar make: gives the memory, touched as the name says.
    :ivar cost: faults of the guest's first write to each leaf that was prefaulted.
    :ivar leaf: bytes of the leaves it is mapped with.
    :ivar settled: nobody changes the memory while the guest writes it.
    """

    name: str
    touched: str
    make: Callable[[], Memory]
    cost: int
    leaf: int = PAGE_SIZE
    needs: tuple[Need, ...] = ()
    source: str = _RULE
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
        raise Skip(f"MADV_COLLAPSE of a memfd: {error.strerror}") from None
    return memory


def _shared_with_a_child(size: int) -> Memory:
    """Copy-on-write with a process that stays."""
    memory = touched(small(size), "write")
    child = os.fork()
    if child == 0:
        select.select([], [], [])
    return memory


def _merged(size: int) -> Memory:
    """Every page the same, merged by KSM."""
    memory = small(size)
    for offset in range(0, size, PAGE_SIZE):
        memory.put(offset, b"the same everywhere")
    memory.advise(MERGEABLE)
    merged = Path("/proc/self/ksm_merging_pages")
    if not merged.exists():
        raise Skip("this kernel does not tell what KSM has merged")
    wait_for(lambda: int(merged.read_text()) >= size // PAGE_SIZE, "KSM to merge the pages", 30)
    return memory


def _soft_clean(size: int) -> Memory:
    """Written, then write-protected by the soft-dirty tracking of /proc/PID/clear_refs."""
    memory = touched(small(size), "write")
    entry = 8 * (memory.address // PAGE_SIZE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        dirty = os.pread(pagemap.fileno(), 8, entry)[6] & 0x80
        Path("/proc/self/clear_refs").write_text("4")
        if not dirty or os.pread(pagemap.fileno(), 8, entry)[6] & 0x80:
            raise Skip("this kernel has no soft-dirty tracking")
    return memory


_ZERO_PAGE = "mm/memory.c:do_anonymous_page(): a read fault gets the zero page"
_COW = "mm/memory.c:do_read_fault(): a private mapping gets the page cache's page, read-only"
_HUGETLB = "mm/hugetlb.c:hugetlb_no_page(): write-protected unless shared"

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
            source="mm/memory.c:do_shared_fault(), mm/vma.c:vma_wants_writenotify(): shmem's "
                   "pages are writable at once"),
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
            source="virt/kvm/kvm_main.c:hva_to_pfn(): copy-on-write is not broken by a read"),
    # KSM goes on, and may merge again what the guest has just written.
    MemoryKind("4k", "merged-by-ksm", lambda: _merged(SMALL), COPIED, needs=(needs.ksm,),
            settled=False),
    MemoryKind("4k", "soft-clean", lambda: _soft_clean(SMALL), UPGRADED,
            source="fs/proc/task_mmu.c:clear_soft_dirty() write-protects"),
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
            expect_writes(fixture.vcpu, memory, 0, value=0x5A5A0001)
        else:
            taken = expect_writes(fixture.vcpu, memory, None)
            expect(taken >= faults, f"{taken} faults, and not at least {faults}")


_COSTS = ("for nothing", "with a fault for each leaf", "with two faults for each leaf")

for kind in MEMORY_KINDS:
    entry = "read-only" if kind.cost else "writable"
    for writes, verb in ((False, "reads"), (True, "writes")):
        cost = _COSTS[kind.cost if writes else 0]
        size = "2 MiB" if kind.leaf == HUGE_PAGE_SIZE else "4 KiB"
        add(
            f"mapping/{kind.name}-{kind.touched}-{verb[:-1]}",
            f"{kind.name}, {kind.touched}: mapped {entry} in {size}; the guest {verb} {cost}",
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
        raise Skip(f"no huge zero page here (use_zero_page?): mapped as {grown}")
    fixture.vcpu.read(GPA, HUGE_PAGE_SIZE // PAGE_SIZE)
    faults = expect_writes(fixture.vcpu, memory, None)
    # Two for each that has to be copied, as above.
    expect(faults in (1, 2, 512, 1024), f"{faults} faults")
    kept = fixture.vm.leaves() - before
    return f"a guest that then writes 2 MiB takes {faults} faults, and has {kept}"


for read_first in (False, True):
    add(
        f"mapping/thp-{'read' if read_first else 'untouched'}-write",
        "THP that nobody wrote is the huge zero page, mapped read-only; the first write splits it "
        "in 4 KiB pages, or gets a huge page",
        "mm/huge_memory.c:do_huge_pmd_wp_page(); 1ced09e0331f allocates a huge page instead",
        lambda read_first=read_first: _huge_zero_page(read_first),  # type: ignore[misc]
        needs.transparent_huge_pages,
        mapping=True,
    )


@case(
    "mapping/populate-after-the-zero-page",
    "THP that was prefaulted untouched and then populated: 4 KiB pages, or a huge page",
    "mm/huge_memory.c:do_huge_pmd_wp_page(); 1ced09e0331f",
    needs.transparent_huge_pages,
    mapping=True,
)
def populate_after_zero_page() -> str:
    fixture = make_fixture(thp(HUGE_PAGE_SIZE))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    fixture.memory.populate()
    expect_mapped(fixture.vm, before, Stage2Leaves(0))  # the notifier has unmapped the zero page
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    grown = fixture.vm.leaves() - before
    expect_equal(grown.bytes, HUGE_PAGE_SIZE, "bytes mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)
    return f"mapped as {grown}"


def _twice(first_read_only: bool) -> str | None:
    """Read-only leaves whose page has become writable without a notifier having said so."""
    if first_read_only:
        fixture = make_fixture(hugetlb(HUGE_PAGE_SIZE, shared=False))
        before = fixture.vm.leaves()
        fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
        expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
        fixture.memory.populate()
        fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
        faults = expect_writes(fixture.vcpu, fixture.memory, None)
        expect(faults in (0, 1), f"{faults} faults of one huge page")
        return "the leaf is made writable" if faults == 0 else "the leaf stays read-only"
    fixture = make_fixture()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    expect_writes(fixture.vcpu, fixture.memory, 0)
    return None


add(
    "mapping/again",
    "prefaulting what is mapped succeeds and changes nothing",
    "mmu/tdp_mmu.c:tdp_mmu_map_handle_target_level()",
    lambda: _twice(False),
    mapping=True,
)
add(
    "mapping/again-upgrade",
    "a read-only leaf whose page became writable: a second prefault makes it writable, or not",
    "mmu/tdp_mmu.c:tdp_mmu_map_handle_target_level(): in newer kernels a prefetch that meets "
    "a leaf is spurious",
    lambda: _twice(True),
    needs.hugetlb_2m,
    mapping=True,
)


def _readonly_slot(writes: bool) -> None:
    fixture = make_fixture(flags=abi.MEM_READONLY)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(fixture.pages))
    expect_reads(fixture.vcpu, fixture.memory, 0)
    if writes:
        words = fixture.memory.words()
        fixture.vcpu.start_at(WRITE_32, rsi=GPA, rcx=1, rdx=PAGE_SIZE, rax=1)
        expect_equal(fixture.vcpu.run(), abi.EXIT_MMIO, "exit reason of the write")
        expect_equal(fixture.vcpu.mmio, (GPA, True), "the MMIO")
        expect_equal(fixture.memory.words(), words, "the slot's memory")


for writes in (False, True):
    add(
        f"mapping/readonly-slot-{'write' if writes else 'read'}",
        "a read-only slot is prefaulted; a guest's write to it is MMIO all the same",
        "virt/kvm/kvm_main.c:__kvm_faultin_pfn(): a read-only slot is not writable",
        lambda writes=writes: _readonly_slot(writes),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "mapping/host-read-only",
    "memory we may only read is mapped read-only; the guest's write is EFAULT to KVM_RUN",
    "virt/kvm/kvm_main.c:hva_to_pfn(), KVM_PFN_ERR_RO_FAULT",
    mapping=True,
)
def host_read_only() -> None:
    memory = touched(small(SMALL), "write")
    memory.protect(PROT_READ)
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, memory.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(fixture.pages))
    expect_reads(fixture.vcpu, memory, 0)
    words = memory.words()
    try:
        fixture.vcpu.write(GPA, 1, 1)
    except OSError as error:
        expect_equal(error.errno, 14, "errno of KVM_RUN")
    else:
        expect(False, "the guest's write went through")
    expect_equal(memory.words(), words, "the memory")


@case(
    "mapping/userfault-write-protected",
    "memory write-protected by userfaultfd is mapped read-only, and the write is still told",
    "virt/kvm/kvm_main.c:hva_to_pfn_slow(): the write is tried, not forced",
    needs.root,
    mapping=True,
)
def userfault_write_protected() -> None:
    memory = touched(small(SMALL), "write")
    userfault = Userfault(memory, write_protect=True)
    userfault.protect()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, memory.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(fixture.pages))
    expect_reads(fixture.vcpu, memory, 0)
    writer = BackgroundCall(lambda: fixture.vcpu.write(GPA, PAGES, 7))
    expect_equal(userfault.wait(), 0, "the page whose write userfaultfd tells of")
    userfault.protect(False)
    writer.result()
    expect_equal(memory.words(), [7] * PAGES, "what the guest has written")


@case(
    "mapping/part-of-a-slot",
    "just the range is mapped, not its neighbours",
    "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()",
    needs.two_dimensional_mmu,
    mapping=True,
)
def part_of_a_slot() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA + 8 * PAGE_SIZE, 4 * PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(4))
    expect_equal(
        fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA + 8 * PAGE_SIZE, 4)),
        0,
        "faults inside",
    )
    expect_equal(
        fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, PAGES)), PAGES - 4, "faults outside"
    )


@case(
    "mapping/neighbours-on-the-legacy-mmu",
    "the legacy MMU maps a page's present neighbours along with it, up to 8 in all",
    "mmu/mmu.c:direct_pte_prefetch()",
    needs.legacy_mmu,
    mapping=True,
)
def neighbours_on_the_legacy_mmu() -> str:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA + 8 * PAGE_SIZE, PAGE_SIZE)
    grown = fixture.vm.leaves() - before
    expect(1 <= grown.pages_4k <= 8, f"mapped {grown}")
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA + 8 * PAGE_SIZE, 8))
    expect(taken <= 8 - grown.pages_4k, f"{taken} faults although {grown.pages_4k} were mapped")
    return f"one page asked for, {grown.pages_4k} mapped"


@case(
    "mapping/above-4g",
    "memory above 4 GiB, for a guest in 64-bit mode on page tables of its own",
    _RULE,
    mapping=True,
)
def above_4g() -> None:
    memory = touched(small(SMALL), "write")
    vm = KvmVm()
    vcpu = vm.vcpu(mode=LONG64)
    at = 700 << 30
    vm.slot(SLOT, at, memory)
    vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(at, memory.size)
    expect_mapped(vm, before, Stage2Leaves(PAGES))
    # The page table that leads there is touched for the first time, too: it is system memory.
    expect_reads(vcpu, memory, 0, gpa=at)
    expect_writes(vcpu, memory, 0, gpa=at)


@case(
    "mapping/executed",
    "prefaulted pages can be executed for nothing where huge pages may be executed",
    "mmu/spte.c:make_spte(): with nx_huge_pages a huge leaf is not executable",
    mapping=True,
)
def executed() -> None:
    fixture = make_fixture()
    for offset in range(0, fixture.size, PAGE_SIZE):
        fixture.memory.put(offset, guest_code.JUMP_BACK)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    back = fixture.vm.program(guest_code.EXECUTE_32) + guest_code.EXECUTE_AFTER_JUMP
    taken = fixture.vcpu.faults_of(
        lambda: fixture.vcpu.call(
            guest_code.EXECUTE_32, rsi=GPA, rcx=PAGES, rdx=PAGE_SIZE, rdi=back
        )
    )
    expect_equal(taken, 0, "faults of a guest that executes 4 KiB pages")


@case(
    "mapping/discarded",
    "MADV_DONTNEED unmaps what was prefaulted (mmu notifier); a new prefault finds the zero page",
    "virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start()",
    mapping=True,
)
def discarded() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.memory.advise(4, 0, 8 * PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES - 8))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_reads(fixture.vcpu, fixture.memory, 0)
    expect_equal(fixture.memory.words()[:8], [0] * 8, "the discarded pages")
    expect_writes(fixture.vcpu, fixture.memory, 8 * COPIED)


@case(
    "mapping/protected-and-back",
    "mprotect() unmaps what was prefaulted, even if in the end nothing changes",
    "mm/mprotect.c:change_protection() calls the notifier",
    mapping=True,
)
def protected_and_back() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.memory.protect(PROT_READ)
    fixture.memory.protect(3)
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "mapping/two-slots-one-memory",
    "two slots on the same memory are two mappings, each prefaulted by itself",
    "virt/kvm/kvm_main.c:__kvm_set_memory_region()",
    mapping=True,
)
def two_slots_one_memory() -> None:
    fixture = make_fixture()
    fixture.vm.slot(2, GPA + 16 * MIB, fixture.memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    fixture.vcpu.prefault_all(GPA + 16 * MIB, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(2 * PAGES))
    expect_writes(fixture.vcpu, fixture.memory, 0)
    expect_reads(fixture.vcpu, fixture.memory, 0, gpa=GPA + 16 * MIB)


@case(
    "mapping/two-vms",
    "two VMs on the same memory have tables of their own",
    "mmu/mmu.c:kvm_mmu_load()",
    mapping=True,
)
def two_vms() -> None:
    fixture = make_fixture()
    other = make_fixture(fixture.memory)
    before = other.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(other.vm.leaves(), before, "leaves of the other VM")
    expect_writes(fixture.vcpu, fixture.memory, 0)
    other.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(other.vcpu, fixture.memory, 0)


@case(
    "mapping/truncated-file",
    "truncating a memfd unmaps its prefaulted pages; from then on they are EFAULT",
    "mm/memory.c:unmap_mapping_range() calls the notifier",
    mapping=True,
)
def truncated_file() -> None:
    fixture = make_fixture(touched(memfd(SMALL), "write"))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    os.truncate(fixture.memory.fd, SMALL // 2)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES // 2))
    result = fixture.vcpu.prefault(GPA + SMALL // 2, SMALL // 2)
    expect_equal(str(result), f"EFAULT, {SMALL // 2:#x} bytes left", "a prefault past its end")


@case(
    "mapping/punched-hole",
    "a hole punched in a memfd unmaps its pages; prefaulting allocates them again, writable",
    "mm/shmem.c:shmem_fallocate()",
    mapping=True,
)
def punched_hole() -> None:
    fixture = make_fixture(touched(memfd(SMALL), "write"))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    system_call(285, fixture.memory.fd, 3, 0, 8 * PAGE_SIZE)  # fallocate: PUNCH_HOLE | KEEP_SIZE
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES - 8))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)
