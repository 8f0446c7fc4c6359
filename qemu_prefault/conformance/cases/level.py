# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that check the size of leaves.

The host's page size and the slot's alignment limit the size of a leaf.
"""

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
from .common import (
    GPA,
    SLOT,
    expect_faults,
    expect_mapped,
    expect_reads,
    expect_writes,
    make_fixture,
)

_LEVEL = "mmu/mmu.c:kvm_mmu_max_mapping_level(), host_pfn_mapping_level()"
_SLOT = "x86.c:kvm_alloc_memslot_metadata() sets disallow_lpage for slot ends and misaligned slots"


@case(
    "level/unaligned-slot",
    "if the gpa and the hva of a slot differ modulo 2 MiB, KVM maps huge pages with 4 KiB leaves",
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
    "KVM uses 4 KiB leaves for the parts of a slot before the first and after the last 2 MiB "
    "boundary",
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
    expect_faults(
        vcpu.faults_of(lambda: vcpu.write(GPA + HUGE_PAGE_SIZE - cut, pages, 5)),
        0,
        9,
        "faults caused by the guest's writes",
    )
    expect_equal(memory.word(HUGE_PAGE_SIZE - cut), 5, "first word of the memory")


@case(
    "level/one-page-of-a-huge-one",
    "a prefault of one 4 KiB page maps the whole huge page that contains the 4 KiB page",
    "mmu/mmu.c:kvm_arch_vcpu_pre_fault_memory() returns the size up to the end of the leaf",
    needs.transparent_huge_pages,
    mapping=True,
)
def one_page_of_a_huge_one() -> None:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA + 5 * PAGE_SIZE, PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/mixed",
    "in one slot, KVM maps huge pages with 2 MiB leaves and 4 KiB pages with 4 KiB leaves",
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
    "if the host collapses pages into a huge page, KVM unmaps the 4 KiB leaves, and a later "
    "prefault maps a 2 MiB leaf",
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
        raise Skip(f"MADV_COLLAPSE failed: {error.strerror}") from None
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "level/split-later",
    "if one page of a huge page is discarded, KVM unmaps the 2 MiB leaf, and a later prefault maps "
    "4 KiB leaves",
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
    "a prefault keeps a 2 MiB leaf that KVM has mapped for a guest's fault",
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
    expect_reads(fixture.vcpu, memory, 0, first=1)


@case(
    "level/1g",
    "KVM maps a 1 GiB hugetlb page with one leaf if the gpa and the hva are aligned to 1 GiB",
    _LEVEL,
    needs.hugetlb_1g,
    mapping=True,
)
def one_gib() -> None:
    memory = hugetlb(GIB, shared=True, page=HUGETLB_1G)
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 0, 1))
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.write(GPA, 64, 9, stride=16 << 20))
    expect_faults(taken, 0, 1, "faults caused by the guest's writes")
    expect_equal(memory.word(63 * (16 << 20)), 9, "last word that the guest wrote")


@case(
    "level/1g-unaligned",
    "KVM maps a 1 GiB hugetlb page with 2 MiB leaves if the gpa and the hva differ by 2 MiB modulo "
    "1 GiB",
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
    expect_faults(taken, 0, 32, "faults caused by the guest's writes")
