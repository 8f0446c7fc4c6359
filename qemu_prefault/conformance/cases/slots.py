# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that delete, move and re-create slots.

QEMU changes slots in this way for firmware, resets and hotplug. If KVM_X86_QUIRK_SLOT_ZAP_ALL is
enabled, KVM drops all tables when a slot is deleted or moved. slot_races.py contains the cases for
two kernel bugs that slot changes can trigger.
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
    """Return a fixture with two prefaulted slots, and the leaves before prefaulting."""
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
    "if any slot is deleted, KVM drops the tables of all slots",
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
    "if SLOT_ZAP_ALL is disabled and a slot is deleted, KVM drops only the leaves of this slot",
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
    "if a slot is deleted in a protected VM, to which SLOT_ZAP_ALL does not apply, KVM drops only "
    "the leaves of this slot",
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
    "SLOT_ZAP_ALL can be disabled after vCPUs have run and memory is prefaulted",
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
    "KVM_ENABLE_CAP with an empty mask does not enable a disabled quirk again, except on kernels "
    "before 6.12.78",
    "x86.c:kvm_vm_ioctl_enable_cap() sets disabled_quirks with |=, but before 6.12.78 with =",
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
    stays = grown == Stage2Leaves(PAGES)
    return "the quirk stays disabled" if stays else "the quirk is enabled again"


@case(
    "slots/quirk-unknown",
    "if the mask contains a quirk that the kernel does not support, KVM_ENABLE_CAP fails with "
    "EINVAL and disables no quirk",
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
    "if a slot is created, KVM drops no tables",
    "virt/kvm/kvm_main.c:kvm_invalidate_memslot() flushes only deleted and moved slots",
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
    "if a slot is deleted and re-created, KVM unmaps the slot, and a later prefault maps it again",
    _ZAP_ALL,
    lambda: _recreate(True),
    mapping=True,
)
add(
    "slots/recreate-without-quirk",
    "if a slot is deleted and re-created, KVM unmaps the slot even if SLOT_ZAP_ALL is disabled",
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
    expect_equal(
        str(result),
        "ENOENT, 0x1000 bytes left",
        "prefault of the old address",
    )
    fixture.vcpu.prefault_all(OTHER_GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0, gpa=OTHER_GPA)


add(
    "slots/move",
    "if a slot is moved, KVM unmaps the old address, and a later prefault maps the new address",
    _ZAP_ALL,
    lambda: _move(True),
    mapping=True,
)
add(
    "slots/move-without-quirk",
    "if a slot is moved, KVM unmaps the old address even if SLOT_ZAP_ALL is disabled",
    _ZAP_ALL,
    lambda: _move(False),
    needs.slot_quirk,
    mapping=True,
)


@case(
    "slots/replaced-memory",
    "if a slot is re-created with other host memory, a later prefault maps the new memory",
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
