# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases in which slots change during the ioctl, or before the vCPU runs again.

These cases detect two kernel bugs. With each bug, the ioctl retries until its thread gets a signal.
The first bug affects a vCPU whose root became obsolete. Commit 20a6cff3b283 (v6.15) fixes this bug.
The second bug affects a slot that is being deleted. Commit 3ccbf6f47098 (v6.18) fixes this bug.
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
    expect_equal(
        str(result),
        "success, 0x0 bytes left",
        "prefault after the deletion of a slot",
    )
    return False


_STALE = (
    "mmu/mmu.c:kvm_mmu_reload() handles KVM_REQ_MMU_FREE_OBSOLETE_ROOTS only since 20a6cff3b283 "
    "(v6.15); before this commit, is_page_fault_stale() is always true"
)


def _stale_root(has_run: bool, remedy: str) -> str | None:
    """Prefault one slot, delete another slot, apply a remedy, and prefault again.

    :param has_run: True to use a vCPU that has run.
    :param remedy: ``run``, ``other vCPU``, ``sregs``, or an empty string to apply no remedy.
    """
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
    expect(not (hung and remedy), f"the ioctl hangs although the remedy {remedy!r} was applied")
    if hung:
        fixture.vcpu.warm()
        expect(not _hangs(fixture.vcpu), "the ioctl hangs even after the vCPU has run")
    reader.warm()
    expect_writes(reader, fixture.memory, 0)
    if hung:
        raise KnownBad(
            "the ioctl retried until a signal arrived, and succeeded after the vCPU had run"
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
        "after a slot is deleted, the ioctl succeeds on a vCPU that has not entered the guest "
        "since the deletion",
        _STALE,
        lambda has_run=has_run: _stale_root(has_run, ""),  # type: ignore[misc]
        mapping=True,
    )
for remedy, name in (
    ("run", "if the vCPU runs first"),
    ("other vCPU", "on a new vCPU"),
    ("sregs", "if KVM_SET_SREGS first changes CR0 and restores it"),
):
    add(
        f"slots/stale-root-remedy-{remedy.lower().replace(' ', '-')}",
        f"after a slot is deleted, the ioctl succeeds {name}",
        _STALE + "; x86.c:__set_sregs() also resets the MMU context",
        lambda remedy=remedy: _stale_root(True, remedy),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "slots/stale-root-without-quirk",
    "if SLOT_ZAP_ALL is disabled, the ioctl succeeds after a slot is deleted, because no root "
    "becomes obsolete",
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
    expect(not _hangs(fixture.vcpu), "the ioctl hangs although SLOT_ZAP_ALL is disabled")
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


def _deleted_meanwhile(quirk: bool, again: bool) -> str | None:
    """Delete a slot while the ioctl waits for a page of this slot.

    :param quirk: False to disable KVM_X86_QUIRK_SLOT_ZAP_ALL.
    :param again: True to create the slot again after the ioctl.
    """
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory, vm=KvmVm(quirk=quirk))
    limit = 10 * HANG_SECONDS
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size, limit=limit))
    expect_equal(userfault.wait(), 0, "offset of the page for which the ioctl waits")
    deleter = BackgroundCall(lambda: fixture.vm.delete(SLOT))
    deleter.wait_state("D")
    # The page becomes present while the slot is KVM_MEMSLOT_INVALID.
    userfault.resolve(0, memory.size)
    result = prefault.result()
    deleter.result()
    expect(result.left >= memory.size - PAGE_SIZE, f"KVM mapped more than one page ({result})")
    hung = result.seconds >= limit
    if not hung:
        expect(result.error in (errno.EAGAIN, 0), f"the ioctl returned {result}, expected EAGAIN")
    if again:
        fixture.vm.slot(SLOT, GPA, memory)
        fixture.vcpu.warm()
        fixture.vcpu.prefault_all(GPA, memory.size)
        expect_reads(fixture.vcpu, memory, 0)
    else:
        fixture.vcpu.warm()
        gone = fixture.vcpu.prefault(GPA, PAGE_SIZE)
        expect_equal(
            str(gone),
            "ENOENT, 0x1000 bytes left",
            "prefault of the deleted slot",
        )
    if hung:
        raise KnownBad(
            "the ioctl and the slot change blocked each other until a signal interrupted the ioctl"
        )
    return None


for quirk in (True, False):
    for again in (False, True):
        add(
            f"slots/deleted-meanwhile{'-and-recreated' if again else ''}"
            f"{'' if quirk else '-without-quirk'}",
            "if the slot is deleted during the ioctl, the ioctl fails with EAGAIN, and a later "
            "prefault " + ("of the re-created slot succeeds" if again else "fails with ENOENT"),
            "mmu/mmu.c:kvm_mmu_faultin_pfn(): before 3ccbf6f47098 (v6.18), the ioctl holds "
            "kvm->srcu and retries on KVM_MEMSLOT_INVALID, but the deleting thread waits for "
            "kvm->srcu",
            lambda quirk=quirk, again=again: _deleted_meanwhile(quirk, again),  # type: ignore[misc]
            needs.root,
            needs.capability,
            *(() if quirk else (needs.slot_quirk,)),
            mapping=again,
        )


@case(
    "slots/moved-meanwhile",
    "if the slot is moved during the ioctl, the ioctl fails with EAGAIN, and a later prefault of "
    "the old address fails with ENOENT",
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
    expect_equal(userfault.wait(), 0, "offset of the page for which the ioctl waits")
    mover = BackgroundCall(lambda: fixture.vm.slot(SLOT, OTHER_GPA, memory))
    mover.wait_state("D")
    userfault.resolve(0, memory.size)
    result = prefault.result()
    mover.result()
    fixture.vcpu.warm()
    gone = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(
        str(gone),
        "ENOENT, 0x1000 bytes left",
        "prefault of the old address",
    )
    fixture.vcpu.prefault_all(OTHER_GPA, memory.size)
    expect_reads(fixture.vcpu, memory, 0, gpa=OTHER_GPA)
    if result.seconds >= limit:
        raise KnownBad(
            "the ioctl and the slot change blocked each other until a signal interrupted the ioctl"
        )
    expect(result.error in (errno.EAGAIN, 0), f"the ioctl returned {result}, expected EAGAIN")


@case(
    "slots/flags-changed-meanwhile",
    "a change to the slot's flags waits until the ioctl ends, and both operations succeed",
    "virt/kvm/kvm_main.c:kvm_update_flags_memslot() does not invalidate the slot",
    needs.root,
    needs.capability,
)
def flags_changed_meanwhile() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory)
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size))
    expect_equal(userfault.wait(), 0, "offset of the page for which the ioctl waits")
    changer = BackgroundCall(
        lambda: fixture.vm.slot(SLOT, GPA, memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    )
    changer.wait_state("D")
    userfault.resolve(0, memory.size)
    expect_equal(str(prefault.result()), "success, 0x0 bytes left", "result of the ioctl")
    changer.result()
    fixture.vm.dirty_pages(SLOT)
    fixture.vcpu.write(GPA, 3, 9)
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1, 2}, "dirty pages after three guest writes")


@case(
    "slots/race",
    "no prefault hangs while another thread deletes and re-creates the slot, as in the kernel's "
    "selftest",
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
        raise KnownBad(
            "the ioctl and the slot change blocked each other until a signal interrupted the ioctl"
        )


@case(
    "slots/other-slot-deleted-meanwhile",
    "if another slot is deleted during the ioctl, the ioctl succeeds or fails with EAGAIN",
    "mmu/mmu.c:is_page_fault_stale() detects that the root is obsolete",
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
        raise KnownBad(
            "the ioctl and the slot change blocked each other until a signal interrupted the ioctl"
        )
    return f"the ioctl ends with {result}"
