# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots that go, move and come back: what QEMU does when firmware, resets and hotplug ask.

Two kernel bugs live here. In both the ioctl retries for ever, and only a signal gets it out:
a vCPU whose root became obsolete (fixed by 20a6cff3b283, v6.15), and a slot that is being
deleted meanwhile (fixed by 3ccbf6f47098, v6.18).
"""

from __future__ import annotations

import errno

from ...host.kvm import Stage2Leaves
from ...units import GIB, PAGE_SIZE
from .. import abi, host
from ..memory import Userfault, small
from ..suite import KnownBad, add, case
from ..vmm import HANG_SECONDS, LONG64, Task, Vcpu, Vm, expect, expect_equal, fails_with
from .common import GPA, PAGES, SLOT, Bench, bench, expect_mapped, expect_reads, expect_writes

_ZAP_ALL = "mmu/mmu.c:kvm_arch_flush_shadow_memslot(), KVM_X86_QUIRK_SLOT_ZAP_ALL"
_OTHER, _OTHER_GPA = 2, 2 * GIB


def _with_other_slot(
    *, quirk: bool = True, kind: int = abi.VM_DEFAULT
) -> tuple[Bench, Stage2Leaves]:
    """A second slot that can go. Both are prefaulted; the leaves from before."""
    machine = bench(vm=Vm(kind, quirk=quirk))
    other = small(8 * PAGE_SIZE)
    other.write()
    machine.vm.slot(_OTHER, _OTHER_GPA, other)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vcpu.prefault_all(_OTHER_GPA, other.size)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES + 8))
    return machine, before


@case(
    "slots/delete-drops-all",
    "deleting any slot drops the tables of all memory, the deleted slot's or not",
    _ZAP_ALL,
    mapping=True,
)
def delete_drops_all() -> None:
    machine, _ = _with_other_slot()
    machine.vm.delete(_OTHER)
    expect_equal(machine.vm.leaves(), Stage2Leaves(0), "leaves")
    machine.vcpu.warm()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "slots/delete-drops-only-its-own",
    "without the quirk a deleted slot drops its own leaves, and no others",
    _ZAP_ALL,
    host.slot_quirk,
    mapping=True,
)
def delete_drops_only_its_own() -> None:
    machine, before = _with_other_slot(quirk=False)
    machine.vm.delete(_OTHER)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "slots/delete-in-a-protected-vm",
    "in a KVM_X86_SW_PROTECTED_VM it is so in any case: the quirk is for ordinary VMs",
    _ZAP_ALL,
    host.software_protected,
    mapping=True,
)
def delete_in_a_protected_vm() -> None:
    machine, before = _with_other_slot(kind=abi.VM_SW_PROTECTED)
    machine.vm.delete(_OTHER)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "slots/quirk-disabled-later",
    "the quirk can be disabled when vCPUs have run and memory is prefaulted",
    "x86.c:kvm_vm_ioctl_enable_cap(), KVM_CAP_DISABLE_QUIRKS2",
    host.slot_quirk,
    mapping=True,
)
def quirk_disabled_later() -> None:
    machine, before = _with_other_slot()
    machine.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES + 8))
    machine.vm.delete(_OTHER)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "slots/quirk-stays-disabled",
    "disabling no quirk leaves it disabled, or (until 6.12.78) enables it again",
    "x86.c:kvm_vm_ioctl_enable_cap(): or, or assignment",
    host.slot_quirk,
    mapping=True,
)
def quirk_stays_disabled() -> str:
    machine, before = _with_other_slot(quirk=False)
    machine.vm.enable(abi.CAP_DISABLE_QUIRKS2, 0)
    machine.vm.delete(_OTHER)
    grown = machine.vm.leaves() - before
    machine.vcpu.warm()
    expect_reads(machine.vcpu, machine.memory, None)
    return "it stays disabled" if grown == Stage2Leaves(PAGES) else "it is enabled again"


@case(
    "slots/quirk-unknown",
    "EINVAL for quirks this kernel does not know; nothing is disabled then",
    "x86.c:kvm_vm_ioctl_enable_cap()",
    host.slot_quirk,
    mapping=True,
)
def quirk_unknown() -> None:
    machine, _ = _with_other_slot()
    seen = fails_with(
        lambda: machine.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL | 1 << 40)
    )
    expect_equal(errno.errorcode.get(seen), "EINVAL", "KVM_ENABLE_CAP")
    machine.vm.delete(_OTHER)
    expect_equal(machine.vm.leaves(), Stage2Leaves(0), "leaves")


@case(
    "slots/create-drops-nothing",
    "creating a slot drops nothing",
    "mmu/mmu.c:kvm_mmu_slot_... : only deleted and moved slots are flushed (x86.c)",
    mapping=True,
)
def create_drops_nothing() -> None:
    machine, before = _with_other_slot()
    machine.vm.slot(3, 3 * GIB, small(PAGE_SIZE))
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES + 8))
    expect_writes(machine.vcpu, machine.memory, 0)


def _recreate(quirk: bool) -> None:
    machine = bench(vm=Vm(quirk=quirk))
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vm.delete(SLOT)
    machine.vm.slot(SLOT, GPA, machine.memory)
    machine.vcpu.warm()
    expect_mapped(machine.vm, before, Stage2Leaves(0))
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_writes(machine.vcpu, machine.memory, 0)


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
    host.slot_quirk,
    mapping=True,
)


def _move(quirk: bool) -> None:
    machine = bench(vm=Vm(quirk=quirk))
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vm.slot(SLOT, _OTHER_GPA, machine.memory)
    machine.vcpu.warm()
    expect_mapped(machine.vm, before, Stage2Leaves(0))
    result = machine.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "ENOENT, 0x1000 bytes left", "a prefault of where it was")
    machine.vcpu.prefault_all(_OTHER_GPA, machine.size)
    expect_reads(machine.vcpu, machine.memory, 0, gpa=_OTHER_GPA)


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
    host.slot_quirk,
    mapping=True,
)


@case(
    "slots/replaced-memory",
    "a slot made anew on other memory shows that memory, not what was prefaulted before",
    _ZAP_ALL,
    mapping=True,
)
def replaced_memory() -> None:
    machine = bench()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vm.delete(SLOT)
    other = small(PAGES * PAGE_SIZE)
    for page in range(PAGES):
        other.put(page * PAGE_SIZE, bytes([page, 7, 0, 0]))
    machine.vm.slot(SLOT, GPA, other)
    machine.vcpu.warm()
    machine.vcpu.prefault_all(GPA, other.size)
    expect_reads(machine.vcpu, other, 0)


# The two livelocks.


def _hangs(vcpu: Vcpu) -> bool:
    """Prefault the slot; whether nothing happens until a signal ends it."""
    result = vcpu.prefault(GPA, PAGES * PAGE_SIZE, limit=HANG_SECONDS)
    if result.error == errno.EINTR and result.seconds >= HANG_SECONDS:
        return True
    expect_equal(str(result), "success, 0x0 bytes left", "a prefault after a slot was deleted")
    return False


_STALE = (
    "mmu/mmu.c:kvm_mmu_reload() until 20a6cff3b283 (v6.15) does not serve "
    "KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, so is_page_fault_stale() is true for ever"
)


def _stale_root(has_run: bool, remedy: str) -> str | None:
    """Prefault, delete a slot, prefault again with a vCPU that was not in the guest since."""
    machine = bench() if has_run else _never_run()
    machine.vcpu.prefault_all(GPA, PAGE_SIZE)
    machine.vm.slot(_OTHER, _OTHER_GPA, small(PAGE_SIZE))
    machine.vm.delete(_OTHER)
    reader = machine.vm.vcpu()
    if remedy == "run":
        machine.vcpu.warm()
    elif remedy == "other vCPU":
        machine.vcpu = reader
    elif remedy == "sregs":
        machine.vcpu.set_mode(LONG64)
        machine.vcpu.set_mode(abi.FLAT32)
    hung = _hangs(machine.vcpu)
    expect(not (hung and remedy), "it hangs even so")
    if hung:
        machine.vcpu.warm()
        expect(not _hangs(machine.vcpu), "it hangs even after the vCPU has run")
    reader.warm()
    expect_writes(reader, machine.memory, 0)
    if hung:
        raise KnownBad("retries for ever, and only a signal ends it; well again once it has run")
    return None


def _never_run() -> Bench:
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = Vm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    return Bench(vm, vcpu, memory)


for has_run, name in ((False, "never-run"), (True, "run-before")):
    add(
        f"slots/stale-root-{name}",
        "prefault, delete a slot, prefault again by a vCPU that was not in the guest since",
        _STALE,
        lambda has_run=has_run: _stale_root(has_run, ""),  # type: ignore[misc]
        mapping=True,
    )
for remedy, name in (
    ("run", "a KVM_RUN in between"),
    ("other vCPU", "a new vCPU"),
    ("sregs", "a change of CR0 and back (KVM_SET_SREGS)"),
):
    add(
        f"slots/stale-root-remedy-{remedy.lower().replace(' ', '-')}",
        f"the same is well with {name}",
        _STALE + "; x86.c:__set_sregs() resets the MMU context",
        lambda remedy=remedy: _stale_root(True, remedy),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "slots/stale-root-without-quirk",
    "the same is well where the quirk was disabled first: no root becomes obsolete",
    _STALE,
    host.slot_quirk,
    mapping=True,
)
def stale_root_without_quirk() -> None:
    machine = _never_run()
    machine.vm.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL)
    machine.vcpu.prefault_all(GPA, PAGE_SIZE)
    machine.vm.slot(_OTHER, _OTHER_GPA, small(PAGE_SIZE))
    machine.vm.delete(_OTHER)
    expect(not _hangs(machine.vcpu), "it hangs even so")
    machine.vcpu.warm()
    expect_writes(machine.vcpu, machine.memory, 0)


def _deleted_meanwhile(quirk: bool, again: bool) -> str | None:
    """The slot goes while the ioctl waits for a page of it."""
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    machine = bench(memory, vm=Vm(quirk=quirk))
    limit = 10 * HANG_SECONDS
    prefault = Task(lambda: machine.vcpu.prefault(GPA, memory.size, limit=limit))
    expect_equal(userfault.wait(), 0, "the page it waits for")
    deleter = Task(lambda: machine.vm.delete(SLOT))
    deleter.wait_state("D")
    # A page is there now. What comes next is a slot that is KVM_MEMSLOT_INVALID.
    userfault.resolve(0, memory.size)
    result = prefault.result()
    deleter.result()
    expect(
        result.left >= memory.size - PAGE_SIZE, f"{result}: more than the page that was waited for"
    )
    hung = result.seconds >= limit
    if not hung:
        expect(result.error in (errno.EAGAIN, 0), f"{result}, and not EAGAIN")
    if again:
        machine.vm.slot(SLOT, GPA, memory)
        machine.vcpu.warm()
        machine.vcpu.prefault_all(GPA, memory.size)
        expect_reads(machine.vcpu, memory, 0)
    else:
        machine.vcpu.warm()
        gone = machine.vcpu.prefault(GPA, PAGE_SIZE)
        expect_equal(str(gone), "ENOENT, 0x1000 bytes left", "a prefault when it is gone")
    if hung:
        raise KnownBad("both wait for each other, until a signal ends the ioctl")
    return None


for quirk in (True, False):
    for again in (False, True):
        add(
            f"slots/deleted-meanwhile{'-and-recreated' if again else ''}"
            f"{'' if quirk else '-without-quirk'}",
            "a slot deleted under the ioctl ends it with EAGAIN"
            + ("; it can be prefaulted when it is back" if again else "; then it is ENOENT"),
            "mmu/mmu.c:kvm_mmu_faultin_pfn(): until 3ccbf6f47098 (v6.18) it retries on "
            "KVM_MEMSLOT_INVALID, holding the SRCU lock that the deleter waits for",
            lambda quirk=quirk, again=again: _deleted_meanwhile(quirk, again),  # type: ignore[misc]
            host.root,
            host.capability,
            *(() if quirk else (host.slot_quirk,)),
            mapping=again,
        )


@case(
    "slots/moved-meanwhile",
    "a slot moved under the ioctl is the same: EAGAIN, and then it is ENOENT where it was",
    "mmu/mmu.c:kvm_mmu_faultin_pfn(), virt/kvm/kvm_main.c:kvm_invalidate_memslot(); 3ccbf6f47098",
    host.root,
    host.capability,
    mapping=True,
)
def moved_meanwhile() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    machine = bench(memory)
    limit = 10 * HANG_SECONDS
    prefault = Task(lambda: machine.vcpu.prefault(GPA, memory.size, limit=limit))
    expect_equal(userfault.wait(), 0, "the page it waits for")
    mover = Task(lambda: machine.vm.slot(SLOT, _OTHER_GPA, memory))
    mover.wait_state("D")
    userfault.resolve(0, memory.size)
    result = prefault.result()
    mover.result()
    machine.vcpu.warm()
    gone = machine.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(gone), "ENOENT, 0x1000 bytes left", "a prefault of where it was")
    machine.vcpu.prefault_all(_OTHER_GPA, memory.size)
    expect_reads(machine.vcpu, memory, 0, gpa=_OTHER_GPA)
    if result.seconds >= limit:
        raise KnownBad("both wait for each other, until a signal ends the ioctl")
    expect(result.error in (errno.EAGAIN, 0), f"{result}, and not EAGAIN")


@case(
    "slots/flags-changed-meanwhile",
    "a change of a slot's flags waits for the ioctl, and disturbs neither",
    "virt/kvm/kvm_main.c:kvm_update_flags_memslot(): the slot is never invalid",
    host.root,
    host.capability,
)
def flags_changed_meanwhile() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    machine = bench(memory)
    prefault = Task(lambda: machine.vcpu.prefault(GPA, memory.size))
    expect_equal(userfault.wait(), 0, "the page it waits for")
    changer = Task(lambda: machine.vm.slot(SLOT, GPA, memory, flags=abi.MEM_LOG_DIRTY_PAGES))
    changer.wait_state("D")
    userfault.resolve(0, memory.size)
    expect_equal(str(prefault.result()), "success, 0x0 bytes left", "the ioctl")
    changer.result()
    machine.vm.dirty_pages(SLOT)
    machine.vcpu.write(GPA, 3, 9)
    expect_equal(machine.vm.dirty_pages(SLOT), {0, 1, 2}, "dirty pages after three writes")


@case(
    "slots/race",
    "a thread that deletes and makes the slot again and again, as the kernel's selftest does it",
    "tools/testing/selftests/kvm/pre_fault_memory_test.c; 3ccbf6f47098",
    host.capability,
    mapping=True,
)
def race() -> None:
    machine = bench()

    def flip() -> None:
        for _ in range(8):
            machine.vm.delete(SLOT)
            machine.vm.slot(SLOT, GPA, machine.memory)

    flipper, hung = Task(flip), False
    while flipper.is_alive():
        result = machine.vcpu.prefault(GPA, machine.size, limit=HANG_SECONDS)
        hung = hung or result.seconds >= HANG_SECONDS
        wanted = (0, errno.EAGAIN, errno.ENOENT, *((errno.EINTR,) if hung else ()))
        expect(result.error in wanted, f"{result}")
    flipper.result()
    machine.vcpu.warm()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_writes(machine.vcpu, machine.memory, 0)
    if hung:
        raise KnownBad("one of them waited for the other, until a signal ended the ioctl")


@case(
    "slots/other-slot-deleted-meanwhile",
    "another slot deleted under the ioctl: the ioctl ends, with success or EAGAIN, or is stuck",
    "mmu/mmu.c:is_page_fault_stale(): the root is obsolete",
    host.root,
    host.capability,
)
def other_slot_deleted_meanwhile() -> str:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    machine = bench(memory)
    machine.vm.slot(_OTHER, _OTHER_GPA, small(PAGE_SIZE))
    prefault = Task(lambda: machine.vcpu.prefault(GPA, memory.size, limit=10 * HANG_SECONDS))
    userfault.wait()
    deleter = Task(lambda: machine.vm.delete(_OTHER))
    deleter.wait_state("D")
    userfault.resolve(0, memory.size)
    result = prefault.result()
    deleter.result()
    machine.vcpu.warm()
    machine.vcpu.prefault_all(GPA, memory.size)
    expect_reads(machine.vcpu, memory, 0)
    if result.seconds >= 10 * HANG_SECONDS:
        raise KnownBad("both wait for each other, until a signal ends the ioctl")
    return f"it ends with {result}"
