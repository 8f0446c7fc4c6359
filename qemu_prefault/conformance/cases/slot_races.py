# SPDX-License-Identifier: GPL-2.0-or-later
"""Slots that change during the ioctl, or before the vCPU enters the guest again.

These cases detect two kernel bugs. With both, the ioctl retries until its thread gets a signal.
The first bug affects a vCPU whose root became obsolete (fixed by 20a6cff3b283, v6.15). The second
affects a slot that is being deleted (fixed by 3ccbf6f47098, v6.18).
"""

from __future__ import annotations

import errno

from ...units import PAGE_SIZE
from .. import abi, needs
from ..device import HANG_SECONDS
from ..expectations import expect, expect_equal
from ..memory import Userfault, small
from ..suite import KnownBad, add, case
from ..threads import BackgroundCall
from ..vmm import LONG64, KvmVcpu, KvmVm
from .common import (
    GPA,
    OTHER_GPA,
    OTHER_SLOT,
    PAGES,
    SLOT,
    Fixture,
    expect_reads,
    expect_writes,
    make_fixture,
)


def _hangs(vcpu: KvmVcpu) -> bool:
    """Prefault the slot, and return whether the ioctl hangs until a signal arrives."""
    result = vcpu.prefault(GPA, PAGES * PAGE_SIZE, limit=HANG_SECONDS)
    if result.error == errno.EINTR and result.seconds >= HANG_SECONDS:
        return True
    expect_equal(str(result), "success, 0x0 bytes left", "a prefault after a slot was deleted")
    return False


_STALE = (
    "mmu/mmu.c:kvm_mmu_reload() handles KVM_REQ_MMU_FREE_OBSOLETE_ROOTS only since 20a6cff3b283 "
    "(v6.15); before, is_page_fault_stale() is always true"
)


def _stale_root(has_run: bool, remedy: str) -> str | None:
    """Prefault, delete a slot, apply a remedy, and prefault again."""
    fixture = make_fixture() if has_run else _never_run()
    fixture.vcpu.prefault_all(GPA, PAGE_SIZE)
    fixture.vm.slot(OTHER_SLOT, OTHER_GPA, small(PAGE_SIZE))
    fixture.vm.delete(OTHER_SLOT)
    reader = fixture.vm.vcpu()
    if remedy == "run":
        fixture.vcpu.warm()
    elif remedy == "other vCPU":
        fixture.vcpu = reader
    elif remedy == "sregs":
        fixture.vcpu.set_mode(LONG64)
        fixture.vcpu.set_mode(abi.FLAT32)
    hung = _hangs(fixture.vcpu)
    expect(not (hung and remedy), f"the ioctl hangs despite the remedy ({remedy})")
    if hung:
        fixture.vcpu.warm()
        expect(not _hangs(fixture.vcpu), "the ioctl hangs even after the vCPU has run")
    reader.warm()
    expect_writes(reader, fixture.memory, 0)
    if hung:
        raise KnownBad(
            "the ioctl retries until a signal arrives; it works again after the vCPU has run"
        )
    return None


def _never_run() -> Fixture:
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    return Fixture(vm, vcpu, memory)


for has_run, name in ((False, "never-run"), (True, "run-before")):
    add(
        f"slots/stale-root-{name}",
        "after a slot is deleted, a vCPU that has not entered the guest since can prefault again",
        _STALE,
        lambda has_run=has_run: _stale_root(has_run, ""),  # type: ignore[misc]
        mapping=True,
    )
for remedy, name in (
    ("run", "after a KVM_RUN"),
    ("other vCPU", "on a new vCPU"),
    ("sregs", "after KVM_SET_SREGS has changed CR0 and restored it"),
):
    add(
        f"slots/stale-root-remedy-{remedy.lower().replace(' ', '-')}",
        f"after a slot is deleted, a prefault works {name}",
        _STALE + "; x86.c:__set_sregs() also resets the MMU context",
        lambda remedy=remedy: _stale_root(True, remedy),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "slots/stale-root-without-quirk",
    "after a slot is deleted with SLOT_ZAP_ALL disabled, a prefault works, because no root becomes "
    "obsolete",
    _STALE,
    needs.slot_quirk,
    mapping=True,
)
def stale_root_without_quirk() -> None:
    fixture = _never_run()
    fixture.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL)
    fixture.vcpu.prefault_all(GPA, PAGE_SIZE)
    fixture.vm.slot(OTHER_SLOT, OTHER_GPA, small(PAGE_SIZE))
    fixture.vm.delete(OTHER_SLOT)
    expect(not _hangs(fixture.vcpu), "the ioctl hangs despite the disabled quirk")
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


def _deleted_meanwhile(quirk: bool, again: bool) -> str | None:
    """Delete the slot while the ioctl waits for one of its pages."""
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory, vm=KvmVm(quirk=quirk))
    limit = 10 * HANG_SECONDS
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size, limit=limit))
    expect_equal(userfault.wait(), 0, "the page that the ioctl waits for")
    deleter = BackgroundCall(lambda: fixture.vm.delete(SLOT))
    deleter.wait_state("D")
    # The page becomes present while the slot is KVM_MEMSLOT_INVALID.
    userfault.resolve(0, memory.size)
    result = prefault.result()
    deleter.result()
    expect(result.left >= memory.size - PAGE_SIZE, f"{result}: more than one page was mapped")
    hung = result.seconds >= limit
    if not hung:
        expect(result.error in (errno.EAGAIN, 0), f"{result}, expected EAGAIN")
    if again:
        fixture.vm.slot(SLOT, GPA, memory)
        fixture.vcpu.warm()
        fixture.vcpu.prefault_all(GPA, memory.size)
        expect_reads(fixture.vcpu, memory, 0)
    else:
        fixture.vcpu.warm()
        gone = fixture.vcpu.prefault(GPA, PAGE_SIZE)
        expect_equal(str(gone), "ENOENT, 0x1000 bytes left", "a prefault of the deleted slot")
    if hung:
        raise KnownBad("ioctl and slot change block each other until a signal ends the ioctl")
    return None


for quirk in (True, False):
    for again in (False, True):
        add(
            f"slots/deleted-meanwhile{'-and-recreated' if again else ''}"
            f"{'' if quirk else '-without-quirk'}",
            "if the slot is deleted during the ioctl, the ioctl fails with EAGAIN; a later "
            "prefault " + ("of the re-created slot succeeds" if again else "fails with ENOENT"),
            "mmu/mmu.c:kvm_mmu_faultin_pfn(): until 3ccbf6f47098 (v6.18), KVM retries on "
            "KVM_MEMSLOT_INVALID and holds kvm->srcu, for which the deleting thread waits",
            lambda quirk=quirk, again=again: _deleted_meanwhile(quirk, again),  # type: ignore[misc]
            needs.root,
            needs.capability,
            *(() if quirk else (needs.slot_quirk,)),
            mapping=again,
        )


@case(
    "slots/moved-meanwhile",
    "if the slot is moved during the ioctl, the ioctl fails with EAGAIN; a prefault of the old "
    "address then fails with ENOENT",
    "mmu/mmu.c:kvm_mmu_faultin_pfn(), virt/kvm/kvm_main.c:kvm_invalidate_memslot(); 3ccbf6f47098",
    needs.root,
    needs.capability,
    mapping=True,
)
def moved_meanwhile() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory)
    limit = 10 * HANG_SECONDS
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size, limit=limit))
    expect_equal(userfault.wait(), 0, "the page that the ioctl waits for")
    mover = BackgroundCall(lambda: fixture.vm.slot(SLOT, OTHER_GPA, memory))
    mover.wait_state("D")
    userfault.resolve(0, memory.size)
    result = prefault.result()
    mover.result()
    fixture.vcpu.warm()
    gone = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(gone), "ENOENT, 0x1000 bytes left", "a prefault of the old address")
    fixture.vcpu.prefault_all(OTHER_GPA, memory.size)
    expect_reads(fixture.vcpu, memory, 0, gpa=OTHER_GPA)
    if result.seconds >= limit:
        raise KnownBad("ioctl and slot change block each other until a signal ends the ioctl")
    expect(result.error in (errno.EAGAIN, 0), f"{result}, expected EAGAIN")


@case(
    "slots/flags-changed-meanwhile",
    "a change of the slot's flags waits until the ioctl ends, and both succeed",
    "virt/kvm/kvm_main.c:kvm_update_flags_memslot() does not invalidate the slot",
    needs.root,
    needs.capability,
)
def flags_changed_meanwhile() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory)
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size))
    expect_equal(userfault.wait(), 0, "the page that the ioctl waits for")
    changer = BackgroundCall(
        lambda: fixture.vm.slot(SLOT, GPA, memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    )
    changer.wait_state("D")
    userfault.resolve(0, memory.size)
    expect_equal(str(prefault.result()), "success, 0x0 bytes left", "the ioctl")
    changer.result()
    fixture.vm.dirty_pages(SLOT)
    fixture.vcpu.write(GPA, 3, 9)
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1, 2}, "dirty pages after three writes")


@case(
    "slots/race",
    "prefaults end while a thread deletes and re-creates the slot, as in the kernel's selftest",
    "tools/testing/selftests/kvm/pre_fault_memory_test.c; 3ccbf6f47098",
    needs.capability,
    mapping=True,
)
def race() -> None:
    fixture = make_fixture()

    def flip() -> None:
        for _ in range(8):
            fixture.vm.delete(SLOT)
            fixture.vm.slot(SLOT, GPA, fixture.memory)

    flipper, hung = BackgroundCall(flip), False
    while flipper.is_alive():
        result = fixture.vcpu.prefault(GPA, fixture.size, limit=HANG_SECONDS)
        hung = hung or result.seconds >= HANG_SECONDS
        wanted = (0, errno.EAGAIN, errno.ENOENT, *((errno.EINTR,) if hung else ()))
        expect(result.error in wanted, f"{result}")
    flipper.result()
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)
    if hung:
        raise KnownBad("ioctl and slot change block each other until a signal ends the ioctl")


@case(
    "slots/other-slot-deleted-meanwhile",
    "if another slot is deleted during the ioctl, the ioctl ends with success or EAGAIN",
    "mmu/mmu.c:is_page_fault_stale(): the root is obsolete",
    needs.root,
    needs.capability,
)
def other_slot_deleted_meanwhile() -> str:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory)
    fixture.vm.slot(OTHER_SLOT, OTHER_GPA, small(PAGE_SIZE))
    prefault = BackgroundCall(
        lambda: fixture.vcpu.prefault(GPA, memory.size, limit=10 * HANG_SECONDS)
    )
    userfault.wait()
    deleter = BackgroundCall(lambda: fixture.vm.delete(OTHER_SLOT))
    deleter.wait_state("D")
    userfault.resolve(0, memory.size)
    result = prefault.result()
    deleter.result()
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, memory.size)
    expect_reads(fixture.vcpu, memory, 0)
    if result.seconds >= 10 * HANG_SECONDS:
        raise KnownBad("ioctl and slot change block each other until a signal ends the ioctl")
    return f"the ioctl ends with {result}"
