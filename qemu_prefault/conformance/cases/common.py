# SPDX-License-Identifier: GPL-2.0-or-later
"""The fixture that most cases use, and checks for the guest's reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from ...host.kvm import Stage2Leaves
from ...units import GIB, PAGE_SIZE
from ..expectations import expect_equal
from ..features import has_ad_bits
from ..memory import Memory, small
from ..vmm import KvmVcpu, KvmVm

#: Guest address of a case's memory. It is aligned for any leaf size and outside the system memory.
GPA = GIB
#: Slot number of a case's memory.
SLOT = 1
#: Slot number and guest address of the second memory region in cases that use two regions.
OTHER_SLOT, OTHER_GPA = 2, 2 * GIB
#: Default number of 4 KiB pages in a case's memory.
PAGES = 32


@dataclass
class Fixture:
    """A VM with one vCPU, and with memory in slot :data:`SLOT` at :data:`GPA`."""

    vm: KvmVm
    vcpu: KvmVcpu
    memory: Memory

    @property
    def size(self) -> int:
        return self.memory.size

    @property
    def pages(self) -> int:
        return self.memory.size // PAGE_SIZE


def make_fixture(
    memory: Memory | None = None, *, written: bool = True, flags: int = 0, vm: KvmVm | None = None
) -> Fixture:
    """Return a new fixture whose vCPU has run.

    :param memory: The memory of the slot, or None to allocate :data:`PAGES` anonymous 4 KiB pages.
    :param written: True to write to the anonymous pages before the VM runs. Ignored unless
        ``memory`` is None.
    :param flags: The flags of the slot.
    :param vm: The VM to use, or None to create a VM.
    """
    if memory is None:
        memory = small(PAGES * PAGE_SIZE)
        if written:
            memory.write()
    vm = vm or KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA, memory, flags=flags)
    vcpu.warm()
    return Fixture(vm, vcpu, memory)


def expect_reads(
    vcpu: KvmVcpu,
    memory: Memory,
    faults: int | None,
    gpa: int = GPA,
    *,
    first: int | None = None,
) -> None:
    """Check the words that the guest reads, and the number of faults that it takes.

    :param faults: The expected number of stage-2 faults, or None to allow any number.
    :param gpa: The guest-physical address of the memory.
    :param first: The argument of :func:`expect_faults`, or None if the guest accesses all leaves
        for the first time.
    """
    wanted = sum(memory.words()) & 0xFFFFFFFF
    before = vcpu.stat("pf_taken")
    expect_equal(
        vcpu.read(gpa, memory.size // PAGE_SIZE),
        wanted,
        "sum of the words that the guest read",
    )
    if faults is not None:
        taken = vcpu.stat("pf_taken") - before
        first = _leaf_count(vcpu, memory) if first is None else first
        expect_faults(taken, faults, first, "faults caused by the guest's reads")


def expect_faults(taken: int, wanted: int, first: int, what: str) -> None:
    """Check the number of faults of the guest's accesses to mapped pages.

    :param wanted: The expected number of faults if stage-2 entries have accessed bits.
    :param first: The number of prefaulted leaves that the guest reads or writes for the first time.
        Without accessed bits, KVM makes these leaves inaccessible, so each of the accesses takes a
        fault (mmu/spte.c:mark_spte_for_access_track()). The fault of a read does not make the leaf
        writable (restore_acc_track_spte()), so the first write is also counted after a read.
    """
    expect_equal(taken, wanted if has_ad_bits() else max(wanted, first), what)


def _leaf_count(vcpu: KvmVcpu, memory: Memory) -> int:
    """Return the number of leaves that map a memory, if all other memory has 4 KiB leaves."""
    leaves = vcpu.vm.leaves()
    covered = leaves.pages_2m * 512
    return leaves.pages_2m + max(0, memory.size // PAGE_SIZE - covered)


def expect_writes(
    vcpu: KvmVcpu,
    memory: Memory,
    faults: int | None,
    gpa: int = GPA,
    value: int = 0xA5A50001,
    *,
    first: int | None = None,
) -> int:
    """Check the words that the guest writes, and the number of faults that it takes.

    :param faults: The expected number of stage-2 faults, or None to allow any number.
    :param gpa: The guest-physical address of the memory.
    :param value: The 32-bit word that the guest writes to each page.
    :param first: The argument of :func:`expect_faults`, or None if the guest writes all leaves for
        the first time.
    :returns: The number of stage-2 faults that the writes took.
    """
    pages = memory.size // PAGE_SIZE
    taken = vcpu.faults_of(lambda: vcpu.write(gpa, pages, value))
    expect_equal(memory.words(), [value] * pages, "words in the memory after the guest's writes")
    if faults is not None:
        first = _leaf_count(vcpu, memory) if first is None else first
        expect_faults(taken, faults, first, "faults caused by the guest's writes")
    return taken


def expect_mapped(vm: KvmVm, before: Stage2Leaves, wanted: Stage2Leaves) -> None:
    """Check that KVM has added exactly the leaves in ``wanted`` since ``before``."""
    expect_equal(str(vm.leaves() - before), str(wanted), "leaves that KVM added")
