# SPDX-License-Identifier: GPL-2.0-or-later
"""How big the leaves are: the smallest of what the host's page, the slot and the range allow."""

from __future__ import annotations

from ...host.kvm import Stage2Leaves
from ...units import GIB, HUGE_PAGE_SIZE, PAGE_SIZE
from .. import needs
from ..expectations import expect_equal
from ..memory import (
    COLLAPSE,
    DONTNEED,
    HUGETLB_1G,
    WITH_HUGEPAGES,
    WITHOUT_HUGEPAGES,
    hugetlb,
    small,
    thp,
)
from ..suite import Skip, case
from ..vmm import KvmVm
from .common import GPA, SLOT, expect_mapped, expect_reads, expect_writes, make_fixture

_LEVEL = "mmu/mmu.c:kvm_mmu_max_mapping_level(), host_pfn_mapping_level()"
_SLOT = "x86.c:kvm_alloc_memslot_metadata(): lpage_info of a slot's ends and misaligned slots"


@case(
    "level/unaligned-slot",
    "a slot whose gpa and hva differ modulo 2 MiB is mapped in 4 KiB, huge pages or not",
    _SLOT,
    needs.transparent_huge_pages,
    mapping=True,
)
def unaligned_slot() -> None:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA + PAGE_SIZE, memory)
    vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(GPA + PAGE_SIZE, HUGE_PAGE_SIZE)
    expect_mapped(vm, before, Stage2Leaves(512))
    expect_writes(vcpu, memory, 0, gpa=GPA + PAGE_SIZE)


@case(
    "level/head-and-tail",
    "where a slot begins and ends between two multiples of 2 MiB, that part is in 4 KiB",
    _SLOT,
    needs.transparent_huge_pages,
    mapping=True,
)
def head_and_tail() -> None:
    memory = thp(3 * HUGE_PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu()
    cut = 4 * PAGE_SIZE
    vm.slot(
        SLOT,
        GPA + HUGE_PAGE_SIZE - cut,
        memory,
        offset=HUGE_PAGE_SIZE - cut,
        size=HUGE_PAGE_SIZE + 2 * cut,
    )
    vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(GPA + HUGE_PAGE_SIZE - cut, HUGE_PAGE_SIZE + 2 * cut)
    expect_mapped(vm, before, Stage2Leaves(8, 1))
    pages = (HUGE_PAGE_SIZE + 2 * cut) // PAGE_SIZE
    expect_equal(
        vcpu.faults_of(lambda: vcpu.write(GPA + HUGE_PAGE_SIZE - cut, pages, 5)),
        0,
        "faults of a writer",
    )
    expect_equal(memory.word(HUGE_PAGE_SIZE - cut), 5, "the first word")


@case(
    "level/one-page-of-a-huge-one",
    "asking for one page maps the whole huge page around it",
    "mmu/mmu.c:kvm_arch_vcpu_pre_fault_memory(): the end of the level that was mapped",
    needs.transparent_huge_pages,
    mapping=True,
)
def one_page_of_a_huge_one() -> None:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA + 5 * PAGE_SIZE, PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/mixed",
    "huge and small host pages in one slot are each mapped as they are",
    _LEVEL,
    needs.transparent_huge_pages,
    mapping=True,
)
def mixed() -> None:
    memory = thp(2 * HUGE_PAGE_SIZE)
    memory.advise(WITHOUT_HUGEPAGES, HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, 2 * HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512, 1))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/collapsed-later",
    "4 KiB leaves of memory that is collapsed are unmapped; the next prefault is a 2 MiB leaf",
    "mm/khugepaged.c:collapse_huge_page() calls the notifier",
    mapping=True,
)
def collapsed_later() -> None:
    memory = small(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512))
    memory.advise(WITH_HUGEPAGES)
    try:
        memory.advise(COLLAPSE)
    except OSError as error:
        raise Skip(f"MADV_COLLAPSE: {error.strerror}") from None
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/split-later",
    "unmapping one page of a huge one takes the 2 MiB leaf; the rest comes back in 4 KiB",
    "mm/huge_memory.c:__split_huge_pmd() calls the notifier",
    needs.transparent_huge_pages,
    mapping=True,
)
def split_later() -> None:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    memory.advise(DONTNEED, 5 * PAGE_SIZE, PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    memory.write()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/guest-then-prefault",
    "what the guest has mapped in 2 MiB already is left as it is",
    _LEVEL,
    needs.transparent_huge_pages,
    mapping=True,
)
def guest_then_prefault() -> None:
    memory = thp(2 * HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.write(GPA, 1, 3)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    fixture.vcpu.prefault_all(GPA, 2 * HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 2))
    expect_reads(fixture.vcpu, memory, 0)


@case(
    "level/1g",
    "a 1 GiB page of hugetlb, with gpa and hva aligned to it, is one leaf",
    _LEVEL,
    needs.hugetlb_1g,
    mapping=True,
)
def one_gib() -> None:
    memory = hugetlb(GIB, shared=True, page=HUGETLB_1G)
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 0, 1))
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.write(GPA, 64, 9, stride=16 << 20))
    expect_equal(taken, 0, "faults of a guest that writes all over it")
    expect_equal(memory.word(63 * (16 << 20)), 9, "its last write")


@case(
    "level/1g-unaligned",
    "the same where gpa and hva differ by 2 MiB: 2 MiB leaves",
    _SLOT,
    needs.hugetlb_1g,
    mapping=True,
)
def one_gib_unaligned() -> None:
    memory = hugetlb(GIB, shared=True, page=HUGETLB_1G)
    vm = KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA + HUGE_PAGE_SIZE, memory, size=GIB - HUGE_PAGE_SIZE)
    vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(GPA + HUGE_PAGE_SIZE, GIB - HUGE_PAGE_SIZE)
    expect_mapped(vm, before, Stage2Leaves(0, 511))
    taken = vcpu.faults_of(lambda: vcpu.write(GPA + HUGE_PAGE_SIZE, 32, 9, stride=16 << 20))
    expect_equal(taken, 0, "faults of a guest that writes")
