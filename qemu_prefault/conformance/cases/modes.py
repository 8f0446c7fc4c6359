# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about SMM and guest mode, which use separate stage-2 tables."""

from __future__ import annotations

from ...units import PAGE_SIZE
from .. import abi, needs, nested_guest
from ..expectations import error_name, expect, expect_equal
from ..memory import Memory, small
from ..suite import case
from ..vmm import KvmVcpu, KvmVm
from .common import GPA, PAGES, SLOT, Fixture, expect_reads, expect_writes, make_fixture

_SMM = "mmu/mmu.c:kvm_calc_cpu_role(): role.smm; kvm_vcpu_memslots(): address space 1"


def _with_smm() -> Fixture:
    """Return a fixture with the same memory in both address spaces."""
    fixture = make_fixture()
    fixture.vm.slot(abi.SMM_SPACE, 0, fixture.vm.system)
    fixture.vm.slot(abi.SMM_SPACE | SLOT, GPA, fixture.memory)
    return fixture


@case(
    "modes/smm-own-tables",
    "a prefault on a vCPU in system management mode fills only the tables of that mode",
    _SMM,
    needs.smm,
    mapping=True,
)
def smm_own_tables() -> None:
    fixture = _with_smm()
    fixture.vcpu.set_smm(True)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    fixture.vcpu.warm()
    expect_reads(fixture.vcpu, fixture.memory, 0)
    fixture.vcpu.set_smm(False)
    fixture.vcpu.warm()
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, PAGES))
    expect(
        taken >= PAGES / 8,
        f"the guest took only {taken} faults outside system management mode, expected at least "
        f"{PAGES / 8:g}",
    )


@case(
    "modes/smm-not-covered",
    "a prefault outside system management mode does not map pages for that mode",
    _SMM,
    needs.smm,
    mapping=True,
)
def smm_not_covered() -> None:
    fixture = _with_smm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0)
    fixture.vcpu.set_smm(True)
    fixture.vcpu.warm()
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, PAGES))
    expect(
        taken >= PAGES / 8,
        f"the guest took only {taken} faults in system management mode, expected at least "
        f"{PAGES / 8:g}",
    )
    fixture.vcpu.set_smm(False)
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "modes/smm-hole",
    "in system management mode, the ioctl fails with ENOENT if only the other address space "
    "contains a slot at the address",
    _SMM,
    needs.smm,
    mapping=True,
)
def smm_hole() -> None:
    fixture = make_fixture()
    fixture.vm.slot(abi.SMM_SPACE, 0, fixture.vm.system)
    fixture.vcpu.set_smm(True)
    result = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "ENOENT, 0x1000 bytes left", "result of the ioctl")
    fixture.vcpu.set_smm(False)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "modes/smm-slot-deleted",
    "if a slot is deleted in one address space, KVM drops the tables of both address spaces",
    "mmu/mmu.c:kvm_mmu_zap_all_fast()",
    needs.smm,
    mapping=True,
)
def smm_slot_deleted() -> None:
    fixture = _with_smm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vm.delete(abi.SMM_SPACE | SLOT)
    expect_equal(fixture.vm.leaves().bytes, 0, "bytes mapped")
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)


_NESTED = (
    "mmu/mmu.c:kvm_tdp_map_page(): arch.mmu is guest_mmu, whose page_fault is not "
    "kvm_tdp_page_fault()"
)
_NESTED_SHADOW = "mmu/mmu.c:kvm_calc_tdp_mmu_root_page_role(): the root depends on role.guest_mode"


def _in_guest_mode(nested_paging: bool) -> tuple[Fixture, KvmVcpu]:
    """Return a fixture whose vCPU runs a nested guest, and a vCPU outside guest mode.

    :param nested_paging: Whether the nested guest uses nested paging, or else shadow paging.
    """
    vm = KvmVm()
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    outside = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    outside.warm()
    vcpu = nested_guest.create_vcpu(vm)
    nested_guest.enter(vcpu, nested_paging=nested_paging)
    return Fixture(vm, vcpu, memory), outside


@case(
    "modes/nested-npt",
    "on a vCPU that runs a nested guest with nested paging, the ioctl fails with EOPNOTSUPP and "
    "maps no page",
    _NESTED,
    needs.nested_guests,
    needs.nested_paging,
    needs.capability,
)
def nested_npt() -> None:
    fixture, _ = _in_guest_mode(nested_paging=True)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, fixture.size)
    expect_equal(error_name(result.error), "EOPNOTSUPP", "result of the ioctl")
    expect_equal(result.left, fixture.size, "bytes left")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    nested_guest.run_again(fixture.vcpu)


@case(
    "modes/nested-npt-another-vcpu",
    "the ioctl succeeds on a vCPU outside guest mode while another vCPU is in guest mode, and the "
    "nested guest continues to run",
    _NESTED,
    needs.nested_guests,
    needs.nested_paging,
    mapping=True,
)
def nested_npt_another_vcpu() -> None:
    fixture, outside = _in_guest_mode(nested_paging=True)
    before = fixture.vm.leaves()
    outside.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_reads(outside, fixture.memory, 0)
    nested_guest.run_again(fixture.vcpu)


@case(
    "modes/nested-shadow",
    "if L1 runs L2 with shadow paging and the vCPU is in guest mode, the ioctl fills only the "
    "tables that KVM uses for guest mode",
    _NESTED_SHADOW,
    needs.nested_guests,
    needs.nested_paging,
    mapping=True,
)
def nested_shadow() -> None:
    fixture, outside = _in_guest_mode(nested_paging=False)
    fixture.vcpu.warm()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)
    nested_guest.run_again(fixture.vcpu)
    taken = outside.faults_of(lambda: outside.read(GPA, PAGES))
    expect(
        taken >= PAGES / 8,
        f"the vCPU outside guest mode took only {taken} faults, expected at least {PAGES / 8:g}",
    )


@case(
    "modes/nested-shadow-not-covered",
    "a prefault outside guest mode does not map pages for a nested guest with shadow paging",
    _NESTED_SHADOW,
    needs.nested_guests,
    needs.nested_paging,
    mapping=True,
)
def nested_shadow_not_covered() -> None:
    fixture, outside = _in_guest_mode(nested_paging=False)
    outside.prefault_all(GPA, fixture.size)
    expect_reads(outside, fixture.memory, 0)
    fixture.vcpu.warm()
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, PAGES))
    expect(
        taken >= PAGES / 8,
        f"the nested guest took only {taken} faults, expected at least {PAGES / 8:g}",
    )


@case(
    "modes/nested-slot-deleted",
    "after a slot is deleted, a nested guest with nested paging continues to run, and the ioctl "
    "succeeds on another vCPU",
    "mmu/mmu.c:kvm_mmu_zap_all_fast()",
    needs.nested_guests,
    needs.nested_paging,
    mapping=True,
)
def nested_slot_deleted() -> None:
    fixture, outside = _in_guest_mode(nested_paging=True)
    other: Memory = small(PAGE_SIZE)
    fixture.vm.slot(2, 2 << 30, other)
    outside.prefault_all(GPA, fixture.size)
    fixture.vm.delete(2)
    nested_guest.run_again(fixture.vcpu)
    outside.warm()
    outside.prefault_all(GPA, fixture.size)
    expect_reads(outside, fixture.memory, 0)
