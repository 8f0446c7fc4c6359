# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots that go, move and come back: what QEMU does when firmware, resets and hotplug ask.

The two kernel bugs that such a change can meet are in slot_races.py.
"""

from __future__ import annotations

import errno

from ...host.kvm import Stage2Leaves
from ...units import GIB, PAGE_SIZE
from .. import abi, needs
from ..expectations import expect_equal, fails_with
from ..memory import small
from ..suite import add, case
from ..vmm import KvmVm
from .common import (
    GPA,
    OTHER_GPA,
    OTHER_SLOT,
    PAGES,
    SLOT,
    Fixture,
    expect_mapped,
    expect_reads,
    expect_writes,
    make_fixture,
)

_ZAP_ALL = "mmu/mmu.c:kvm_arch_flush_shadow_memslot(), KVM_X86_QUIRK_SLOT_ZAP_ALL"


def _with_other_slot(
    *, quirk: bool = True, kind: int = abi.VM_DEFAULT
) -> tuple[Fixture, Stage2Leaves]:
    """A second slot that can go. Both are prefaulted; the leaves from before."""
    fixture = make_fixture(vm=KvmVm(kind, quirk=quirk))
    other = small(8 * PAGE_SIZE)
    other.write()
    fixture.vm.slot(OTHER_SLOT, OTHER_GPA, other)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vcpu.prefault_all(OTHER_GPA, other.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES + 8))
    return fixture, before


@case(
    "slots/delete-drops-all",
    "deleting any slot drops the tables of all memory, the deleted slot's or not",
    _ZAP_ALL,
    mapping=True,
)
def delete_drops_all() -> None:
    fixture, _ = _with_other_slot()
    fixture.vm.delete(OTHER_SLOT)
    expect_equal(fixture.vm.leaves(), Stage2Leaves(0), "leaves")
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "slots/delete-drops-only-its-own",
    "without the quirk a deleted slot drops its own leaves, and no others",
    _ZAP_ALL,
    needs.slot_quirk,
    mapping=True,
)
def delete_drops_only_its_own() -> None:
    fixture, before = _with_other_slot(quirk=False)
    fixture.vm.delete(OTHER_SLOT)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "slots/delete-in-a-protected-vm",
    "in a KVM_X86_SW_PROTECTED_VM it is so in any case: the quirk is for ordinary VMs",
    _ZAP_ALL,
    needs.software_protected,
    mapping=True,
)
def delete_in_a_protected_vm() -> None:
    fixture, before = _with_other_slot(kind=abi.VM_SW_PROTECTED)
    fixture.vm.delete(OTHER_SLOT)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "slots/quirk-disabled-later",
    "the quirk can be disabled when vCPUs have run and memory is prefaulted",
    "x86.c:kvm_vm_ioctl_enable_cap(), KVM_CAP_DISABLE_QUIRKS2",
    needs.slot_quirk,
    mapping=True,
)
def quirk_disabled_later() -> None:
    fixture, before = _with_other_slot()
    fixture.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES + 8))
    fixture.vm.delete(OTHER_SLOT)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "slots/quirk-stays-disabled",
    "disabling no quirk leaves it disabled, or (until 6.12.78) enables it again",
    "x86.c:kvm_vm_ioctl_enable_cap(): or, or assignment",
    needs.slot_quirk,
    mapping=True,
)
def quirk_stays_disabled() -> str:
    fixture, before = _with_other_slot(quirk=False)
    fixture.vm.enable(abi.CAP_DISABLE_QUIRKS2, 0)
    fixture.vm.delete(OTHER_SLOT)
    grown = fixture.vm.leaves() - before
    fixture.vcpu.warm()
    expect_reads(fixture.vcpu, fixture.memory, None)
    return "it stays disabled" if grown == Stage2Leaves(PAGES) else "it is enabled again"


@case(
    "slots/quirk-unknown",
    "EINVAL for quirks this kernel does not know; nothing is disabled then",
    "x86.c:kvm_vm_ioctl_enable_cap()",
    needs.slot_quirk,
    mapping=True,
)
def quirk_unknown() -> None:
    fixture, _ = _with_other_slot()
    seen = fails_with(
        lambda: fixture.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL | 1 << 40)
    )
    expect_equal(errno.errorcode.get(seen), "EINVAL", "KVM_ENABLE_CAP")
    fixture.vm.delete(OTHER_SLOT)
    expect_equal(fixture.vm.leaves(), Stage2Leaves(0), "leaves")


@case(
    "slots/create-drops-nothing",
    "creating a slot drops nothing",
    "mmu/mmu.c:kvm_mmu_slot_... : only deleted and moved slots are flushed (x86.c)",
    mapping=True,
)
def create_drops_nothing() -> None:
    fixture, before = _with_other_slot()
    fixture.vm.slot(3, 3 * GIB, small(PAGE_SIZE))
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES + 8))
    expect_writes(fixture.vcpu, fixture.memory, 0)


def _recreate(quirk: bool) -> None:
    fixture = make_fixture(vm=KvmVm(quirk=quirk))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vm.delete(SLOT)
    fixture.vm.slot(SLOT, GPA, fixture.memory)
    fixture.vcpu.warm()
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_writes(fixture.vcpu, fixture.memory, 0)


add(
    "slots/recreate",
    "a slot that was deleted and made again has to be prefaulted again",
    _ZAP_ALL,
    lambda: _recreate(True),
    mapping=True,
)
add(
    "slots/recreate-without-quirk",
    "the same without the quirk",
    _ZAP_ALL,
    lambda: _recreate(False),
    needs.slot_quirk,
    mapping=True,
)


def _move(quirk: bool) -> None:
    fixture = make_fixture(vm=KvmVm(quirk=quirk))
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vm.slot(SLOT, OTHER_GPA, fixture.memory)
    fixture.vcpu.warm()
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    result = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "ENOENT, 0x1000 bytes left", "a prefault of where it was")
    fixture.vcpu.prefault_all(OTHER_GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0, gpa=OTHER_GPA)


add(
    "slots/move",
    "a moved slot is unmapped where it was, and can be prefaulted where it is",
    _ZAP_ALL,
    lambda: _move(True),
    mapping=True,
)
add(
    "slots/move-without-quirk",
    "the same without the quirk",
    _ZAP_ALL,
    lambda: _move(False),
    needs.slot_quirk,
    mapping=True,
)


@case(
    "slots/replaced-memory",
    "a slot made anew on other memory shows that memory, not what was prefaulted before",
    _ZAP_ALL,
    mapping=True,
)
def replaced_memory() -> None:
    fixture = make_fixture()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vm.delete(SLOT)
    other = small(PAGES * PAGE_SIZE)
    for page in range(PAGES):
        other.put(page * PAGE_SIZE, bytes([page, 7, 0, 0]))
    fixture.vm.slot(SLOT, GPA, other)
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, other.size)
    expect_reads(fixture.vcpu, other, 0)
