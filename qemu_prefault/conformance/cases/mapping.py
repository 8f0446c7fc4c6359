# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about repeated, read-only and partial mappings, and about unmapped pages."""

from __future__ import annotations

import os

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE
from .. import abi, guest_code, needs
from ..expectations import expect, expect_equal
from ..features import has_ad_bits
from ..guest_code import WRITE_32
from ..memory import (
    DONTNEED,
    PROT_READ,
    READ_WRITE,
    Userfault,
    hugetlb,
    memfd,
    small,
    system_call,
)
from ..suite import add, case
from ..threads import BackgroundCall
from ..vmm import LONG64, KvmVm
from .common import (
    GPA,
    PAGES,
    SLOT,
    expect_faults,
    expect_mapped,
    expect_reads,
    expect_writes,
    make_fixture,
)
from .memory_kinds import COPIED, RULE, SMALL, touched


def _twice(first_read_only: bool) -> str | None:
    """Prefault the same memory twice.

    :param first_read_only: Whether the first prefault maps the memory read-only. If True, the
        memory is private hugetlb memory, and the function populates it before the second prefault.
        This does not call KVM's mmu notifier, so KVM keeps the read-only leaf.
    """
    if first_read_only:
        fixture = make_fixture(hugetlb(HUGE_PAGE_SIZE, shared=False))
        before = fixture.vm.leaves()
        fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
        expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
        fixture.memory.populate()
        fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
        faults = expect_writes(fixture.vcpu, fixture.memory, None)
        expect(
            faults in (0, 1), f"the guest took {faults} faults on one huge page, expected 0 or 1"
        )
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
    "a prefault of mapped memory succeeds and changes nothing",
    "mmu/tdp_mmu.c:tdp_mmu_map_handle_target_level()",
    lambda: _twice(False),
    mapping=True,
)
add(
    "mapping/again-upgrade",
    "a second prefault makes a read-only leaf writable if the page is now writable, unless the "
    "kernel treats a prefetch of a mapped page as spurious",
    "mmu/tdp_mmu.c:tdp_mmu_map_handle_target_level()",
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
        expect_equal(fixture.vcpu.run(), abi.EXIT_MMIO, "exit reason of the guest's write")
        expect_equal(fixture.vcpu.mmio, (GPA, True), "MMIO access")
        expect_equal(fixture.memory.words(), words, "words in the slot's memory")


for writes in (False, True):
    add(
        f"mapping/readonly-slot-{'write' if writes else 'read'}",
        "a read-only slot can be prefaulted, and a guest's write to the slot still causes an MMIO "
        "exit",
        "virt/kvm/kvm_main.c:__kvm_faultin_pfn() maps the pages of a read-only slot read-only",
        lambda writes=writes: _readonly_slot(writes),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "mapping/host-read-only",
    "if host memory is not writable, KVM maps the memory read-only, and KVM_RUN fails with EFAULT "
    "if the guest writes to this memory",
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
        expect(False, "the guest's write to read-only memory succeeded")
    expect_equal(memory.words(), words, "words in the memory")


@case(
    "mapping/userfault-write-protected",
    "if userfaultfd write-protects memory, KVM maps the memory read-only, and userfaultfd reports "
    "the guest's writes",
    "virt/kvm/kvm_main.c:hva_to_pfn_slow(): a read fault does not require write access",
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
    expect_equal(userfault.wait(), 0, "offset of the write that userfaultfd reported")
    userfault.protect(False)
    writer.result()
    expect_equal(memory.words(), [7] * PAGES, "words in the memory after the guest's writes")


@case(
    "mapping/part-of-a-slot",
    "the TDP MMU maps only the pages of the range, and no neighbouring pages",
    "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()",
    needs.two_dimensional_mmu,
    mapping=True,
)
def part_of_a_slot() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA + 8 * PAGE_SIZE, 4 * PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(4))
    expect_faults(
        fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA + 8 * PAGE_SIZE, 4)),
        0,
        4,
        "faults taken by the guest inside the range",
    )
    expect_equal(
        fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, PAGES)),
        PAGES - 4,
        "faults taken by the guest outside the range",
    )


@case(
    "mapping/neighbours-on-the-legacy-mmu",
    "the legacy MMU also maps present pages next to a requested page, up to 8 pages in total",
    "mmu/mmu.c:direct_pte_prefetch()",
    needs.legacy_mmu,
    mapping=True,
)
def neighbours_on_the_legacy_mmu() -> str:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA + 8 * PAGE_SIZE, PAGE_SIZE)
    grown = fixture.vm.leaves() - before
    expect(1 <= grown.pages_4k <= 8, f"KVM mapped {grown}, expected 1 to 8 pages")
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA + 8 * PAGE_SIZE, 8))
    expect(
        taken <= 8 - (grown.pages_4k if has_ad_bits() else 0),
        f"the guest took {taken} faults although KVM had mapped {grown.pages_4k} of 8 pages",
    )
    return f"1 page requested, {grown.pages_4k} mapped"


@case(
    "mapping/above-4g",
    "a prefault maps memory above 4 GiB for a guest that runs in 64-bit mode with its own page "
    "tables",
    RULE,
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
    # The guest's page tables are in the system memory, so accesses to them cause no fault.
    expect_reads(vcpu, memory, 0, gpa=at)
    expect_writes(vcpu, memory, 0, gpa=at)


@case(
    "mapping/executed",
    "a guest executes code in prefaulted 4 KiB pages without faults",
    "mmu/spte.c:make_spte() makes a huge leaf non-executable if nx_huge_pages is enabled",
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
    expect_faults(taken, 0, PAGES, "faults taken by the guest when it executed the pages")


@case(
    "mapping/discarded",
    "if MADV_DONTNEED discards prefaulted pages, KVM unmaps them, and a later prefault maps the "
    "zero page",
    "virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start()",
    mapping=True,
)
def discarded() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.memory.advise(DONTNEED, 0, 8 * PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES - 8))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    # Without A/D bits, the second prefault makes the leaves that it finds accessible.
    expect_reads(fixture.vcpu, fixture.memory, 0, first=8)
    expect_equal(fixture.memory.words()[:8], [0] * 8, "words in the discarded pages")
    upgraded = 0 if has_ad_bits() else PAGES - 8
    expect_writes(fixture.vcpu, fixture.memory, 8 * COPIED + upgraded, first=0)


@case(
    "mapping/protected-and-back",
    "if mprotect() changes the protection of prefaulted pages, KVM unmaps them, even if a second "
    "call restores the protection",
    "mm/mprotect.c:change_protection() calls the notifier",
    mapping=True,
)
def protected_and_back() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.memory.protect(PROT_READ)
    fixture.memory.protect(READ_WRITE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "mapping/two-slots-one-memory",
    "if two slots use the same host memory, a prefault of one slot does not map the other slot",
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
    "if two VMs use the same host memory, a prefault in one VM maps nothing in the other VM",
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
    "if a memfd is truncated, KVM unmaps the removed pages, and a later prefault of these pages "
    "fails with EFAULT",
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
    expect_equal(
        str(result),
        f"EFAULT, {SMALL // 2:#x} bytes left",
        "prefault beyond the end of the file",
    )


@case(
    "mapping/punched-hole",
    "if a hole is punched in a memfd, KVM unmaps the pages in the hole, and a later prefault maps "
    "new pages writable",
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
