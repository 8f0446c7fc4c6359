# SPDX-License-Identifier: GPL-2.0-or-later
"""System management mode and guest mode: a vCPU that has other tables loaded than the guest's."""

from __future__ import annotations

from ...units import PAGE_SIZE
from .. import abi, guest, host
from ..memory import Memory, small
from ..suite import case
from ..vmm import (
    COUNTER,
    HOST_SAVE,
    LONG64,
    TABLES,
    VMCB,
    VMRUN_HOST_SAVE_MSR,
    Vcpu,
    Vm,
    error_name,
    expect,
    expect_equal,
)
from .common import GPA, PAGES, SLOT, Bench, bench, expect_reads, expect_writes

_SMM = "mmu/mmu.c:kvm_calc_cpu_role(): role.smm; kvm_vcpu_memslots(): address space 1"


def _with_smm() -> Bench:
    """The same memory in both address spaces."""
    machine = bench()
    machine.vm.slot(abi.SMM_SPACE, 0, machine.vm.system)
    machine.vm.slot(abi.SMM_SPACE | SLOT, GPA, machine.memory)
    return machine


@case(
    "modes/smm-own-tables",
    "a vCPU in system management mode prefaults that mode's tables, and no others",
    _SMM,
    host.smm,
    mapping=True,
)
def smm_own_tables() -> None:
    machine = _with_smm()
    machine.vcpu.set_smm(True)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    machine.vcpu.warm()
    expect_reads(machine.vcpu, machine.memory, 0)
    machine.vcpu.set_smm(False)
    machine.vcpu.warm()
    taken = machine.vcpu.faults_of(lambda: machine.vcpu.read(GPA, PAGES))
    expect(taken >= PAGES / 8, f"outside of it the guest faults ({taken})")


@case(
    "modes/smm-not-covered",
    "what is prefaulted outside is not there in system management mode",
    _SMM,
    host.smm,
    mapping=True,
)
def smm_not_covered() -> None:
    machine = _with_smm()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_reads(machine.vcpu, machine.memory, 0)
    machine.vcpu.set_smm(True)
    machine.vcpu.warm()
    taken = machine.vcpu.faults_of(lambda: machine.vcpu.read(GPA, PAGES))
    expect(taken >= PAGES / 8, f"inside the guest faults ({taken})")
    machine.vcpu.set_smm(False)
    machine.vcpu.warm()
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "modes/smm-hole",
    "ENOENT in system management mode for memory that is only in the other address space",
    _SMM,
    host.smm,
    mapping=True,
)
def smm_hole() -> None:
    machine = bench()
    machine.vm.slot(abi.SMM_SPACE, 0, machine.vm.system)
    machine.vcpu.set_smm(True)
    result = machine.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "ENOENT, 0x1000 bytes left", "the ioctl")
    machine.vcpu.set_smm(False)
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vcpu.warm()
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "modes/smm-slot-deleted",
    "deleting a slot of one address space drops the tables of both",
    "mmu/mmu.c:kvm_mmu_zap_all_fast()",
    host.smm,
    mapping=True,
)
def smm_slot_deleted() -> None:
    machine = _with_smm()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vm.delete(abi.SMM_SPACE | SLOT)
    expect_equal(machine.vm.leaves().bytes, 0, "bytes mapped")
    machine.vcpu.warm()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_writes(machine.vcpu, machine.memory, 0)


_NESTED = "mmu/mmu.c:kvm_tdp_map_page(): arch.mmu is guest_mmu, whose page_fault is no TDP one"
_NESTED_SHADOW = "mmu/mmu.c: root_mmu with role.guest_mode is a TDP MMU with a root of its own"


def _in_guest_mode(npt: bool) -> tuple[Bench, Vcpu]:
    """A vCPU that runs a guest of its guest, which has just told us so, and one that does not."""
    vm = Vm()
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vcpu = vm.vcpu(mode=LONG64.with_efer(abi.EFER_SVME))
    outside = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    outside.warm()
    vcpu.warm()
    nested_cr3 = TABLES if npt else None
    code = guest.vmcb(rip=vm.program(guest.COUNT_AND_TELL), cr3=TABLES, nested_cr3=nested_cr3)
    vm.system.put(VMCB, code)
    vcpu.set_msr(VMRUN_HOST_SAVE_MSR, HOST_SAVE)
    vcpu.start_at(guest.VMRUN, rax=VMCB, rbx=COUNTER)
    expect_equal(vcpu.run(), abi.EXIT_IO, "exit of the nested guest")
    expect_equal(vcpu.stat("guest_mode"), 1, "guest_mode")
    expect_equal(vm.counter, 1, "the nested guest's count")
    return Bench(vm, vcpu, memory), outside


def _goes_on(vcpu: Vcpu) -> None:
    """The nested guest counts on."""
    before = vcpu.vm.counter
    vcpu.start_at(guest.COUNT_AND_TELL, rbx=COUNTER)
    expect_equal(vcpu.run(), abi.EXIT_IO, "exit of the nested guest")
    expect_equal(vcpu.vm.counter, before + 1, "the nested guest's count")
    expect_equal(vcpu.stat("guest_mode"), 1, "guest_mode")


@case(
    "modes/nested-npt",
    "EOPNOTSUPP on a vCPU that runs a nested guest on nested NPT; nothing is mapped",
    _NESTED,
    host.nested_svm,
    host.nested_paging,
    host.capability,
)
def nested_npt() -> None:
    machine, _ = _in_guest_mode(npt=True)
    before = machine.vm.leaves()
    result = machine.vcpu.prefault(GPA, machine.size)
    expect_equal(error_name(result.error), "EOPNOTSUPP", "the ioctl")
    expect_equal(result.left, machine.size, "bytes left")
    expect_equal(machine.vm.leaves(), before, "leaves")
    _goes_on(machine.vcpu)


@case(
    "modes/nested-npt-another-vcpu",
    "another vCPU, outside of guest mode, prefaults for all; the nested guest goes on",
    _NESTED,
    host.nested_svm,
    host.nested_paging,
    mapping=True,
)
def nested_npt_another_vcpu() -> None:
    machine, outside = _in_guest_mode(npt=True)
    before = machine.vm.leaves()
    outside.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_reads(outside, machine.memory, 0)
    _goes_on(machine.vcpu)


@case(
    "modes/nested-shadow",
    "on a vCPU whose nested guest is shadow-paged it succeeds, for the nested guest's root alone",
    _NESTED_SHADOW,
    host.nested_svm,
    host.nested_paging,
    mapping=True,
)
def nested_shadow() -> None:
    machine, outside = _in_guest_mode(npt=False)
    machine.vcpu.warm()
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_reads(machine.vcpu, machine.memory, 0)
    _goes_on(machine.vcpu)
    taken = outside.faults_of(lambda: outside.read(GPA, PAGES))
    expect(taken >= PAGES / 8, f"the guest itself still faults ({taken})")


@case(
    "modes/nested-shadow-not-covered",
    "what is prefaulted outside of guest mode is not there for a shadow-paged nested guest",
    _NESTED_SHADOW,
    host.nested_svm,
    host.nested_paging,
    mapping=True,
)
def nested_shadow_not_covered() -> None:
    machine, outside = _in_guest_mode(npt=False)
    outside.prefault_all(GPA, machine.size)
    expect_reads(outside, machine.memory, 0)
    machine.vcpu.warm()
    taken = machine.vcpu.faults_of(lambda: machine.vcpu.read(GPA, PAGES))
    expect(taken >= PAGES / 8, f"the nested guest faults ({taken})")


@case(
    "modes/nested-slot-deleted",
    "a slot deleted while a nested guest is on NPT: it goes on, the other vCPU prefaults again",
    "mmu/mmu.c:kvm_mmu_zap_all_fast()",
    host.nested_svm,
    host.nested_paging,
    mapping=True,
)
def nested_slot_deleted() -> None:
    machine, outside = _in_guest_mode(npt=True)
    other: Memory = small(PAGE_SIZE)
    machine.vm.slot(2, 2 << 30, other)
    outside.prefault_all(GPA, machine.size)
    machine.vm.delete(2)
    _goes_on(machine.vcpu)
    outside.warm()
    outside.prefault_all(GPA, machine.size)
    expect_reads(outside, machine.memory, 0)
