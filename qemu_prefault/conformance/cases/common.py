# SPDX-License-Identifier: GPL-2.0-or-later
"""What cases share: a VM with one slot of a few pages."""

from __future__ import annotations

from dataclasses import dataclass

from ...host.kvm import Stage2Leaves
from ...units import GIB, PAGE_SIZE
from ..expectations import expect_equal
from ..memory import Memory, small
from ..vmm import KvmVcpu, KvmVm

GPA = GIB
"""Where a case's memory is in the guest: aligned for any leaf, and no firmware near."""
SLOT = 1
OTHER_SLOT, OTHER_GPA = 2, 2 * GIB
"""Of a second slot, in cases that have one."""
PAGES = 32


@dataclass
class Fixture:
    """A VM whose slot :data:`SLOT` at :data:`GPA` is some memory, and a vCPU that has run."""

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
    """A fresh one. Without ``memory``: 32 anonymous 4 KiB pages, written or not."""
    if memory is None:
        memory = small(PAGES * PAGE_SIZE)
        if written:
            memory.write()
    vm = vm or KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA, memory, flags=flags)
    vcpu.warm()
    return Fixture(vm, vcpu, memory)


def expect_reads(vcpu: KvmVcpu, memory: Memory, faults: int | None, gpa: int = GPA) -> None:
    """The guest reads the memory: its contents, with so many faults."""
    wanted = sum(memory.words()) & 0xFFFFFFFF
    before = vcpu.stat("pf_taken")
    expect_equal(vcpu.read(gpa, memory.size // PAGE_SIZE), wanted, "the sum that the guest reads")
    if faults is not None:
        expect_equal(vcpu.stat("pf_taken") - before, faults, "faults of a guest that reads")


def expect_writes(
    vcpu: KvmVcpu, memory: Memory, faults: int | None, gpa: int = GPA, value: int = 0xA5A50001
) -> int:
    """The guest writes the memory: we see it there, after so many faults (which are given)."""
    pages = memory.size // PAGE_SIZE
    taken = vcpu.faults_of(lambda: vcpu.write(gpa, pages, value))
    expect_equal(memory.words(), [value] * pages, "what the guest has written")
    if faults is not None:
        expect_equal(taken, faults, "faults of a guest that writes")
    return taken


def expect_mapped(vm: KvmVm, before: Stage2Leaves, wanted: Stage2Leaves) -> None:
    expect_equal(str(vm.leaves() - before), str(wanted), "leaves that the prefault has added")
