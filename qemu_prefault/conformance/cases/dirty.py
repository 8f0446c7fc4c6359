# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty logging: what a migration's source, or a display, has switched on."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import abi, host
from ..memory import huge, small
from ..suite import case
from ..vmm import Vcpu, Vm, expect, expect_equal, ioctl
from .common import GPA, PAGES, SLOT, Bench, bench, expect_mapped, expect_reads, expect_writes

_MARK = "mmu/spte.c:make_spte(): a writable entry of a slot with a dirty log is dirty at once"


def _logging(machine: Bench, on: bool = True) -> None:
    machine.vm.slot(SLOT, GPA, machine.memory, flags=abi.MEM_LOG_DIRTY_PAGES if on else 0)


@case(
    "dirty/log-marks-all",
    "with dirty logging on, every page that is prefaulted writable counts as written",
    _MARK,
    mapping=True,
)
def log_marks_all() -> None:
    machine = bench(flags=abi.MEM_LOG_DIRTY_PAGES)
    expect_equal(machine.vm.dirty_pages(SLOT), set(), "dirty pages at first")
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal(machine.vm.dirty_pages(SLOT), set(range(PAGES)), "dirty pages")
    expect_reads(machine.vcpu, machine.memory, 0)


@case(
    "dirty/log-leaves-read-only-alone",
    "pages that are prefaulted read-only do not count as written, until the guest writes",
    _MARK,
    mapping=True,
)
def log_leaves_read_only_alone() -> None:
    machine = bench(small(PAGES * PAGE_SIZE), flags=abi.MEM_LOG_DIRTY_PAGES)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_equal(machine.vm.dirty_pages(SLOT), set(), "dirty pages")
    machine.vcpu.write(GPA, 4, 9)
    expect_equal(machine.vm.dirty_pages(SLOT), {0, 1, 2, 3}, "dirty pages after four writes")


@case(
    "dirty/log-is-true-to-the-guest",
    "after the log was taken, a prefault marks nothing, and the guest's next writes are seen",
    "virt/kvm/kvm_main.c:kvm_get_dirty_log_protect() makes the entries read-only again",
    mapping=True,
)
def log_is_true_to_the_guest() -> str:
    machine = bench(flags=abi.MEM_LOG_DIRTY_PAGES)
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal(len(machine.vm.dirty_pages(SLOT)), PAGES, "dirty pages")
    expect_equal(machine.vm.dirty_pages(SLOT), set(), "dirty pages, taken again")
    machine.vcpu.write(GPA, 2, 5)
    expect_equal(machine.vm.dirty_pages(SLOT), {0, 1}, "dirty pages after two writes")
    machine.vcpu.prefault_all(GPA, machine.size)
    marked = len(machine.vm.dirty_pages(SLOT))
    expect(marked in (0, PAGES), f"a second prefault marks {marked} pages")
    machine.vcpu.write(GPA, 3, 6)
    after = machine.vm.dirty_pages(SLOT)
    expect_equal(after, {0, 1, 2}, "dirty pages after three more writes")
    return f"a second prefault marks {marked} of {PAGES} pages"


@case(
    "dirty/log-forces-4k",
    "with dirty logging on, huge pages are mapped in 4 KiB",
    "mmu/mmu.c:kvm_mmu_hugepage_adjust(): kvm_slot_dirty_track_enabled()",
    host.transparent_huge_pages,
    mapping=True,
)
def log_forces_4k() -> None:
    memory = huge(HUGE_PAGE_SIZE)
    memory.write()
    machine = bench(memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(machine.vm, before, Stage2Leaves(512))
    expect_equal(len(machine.vm.dirty_pages(SLOT)), 512, "dirty pages")


@case(
    "dirty/start-splits",
    "switching logging on splits what was prefaulted in 2 MiB, or has the guest's writes split it",
    "x86.c:kvm_mmu_slot_apply_flags()",
    host.transparent_huge_pages,
    mapping=True,
)
def start_splits() -> str:
    memory = huge(HUGE_PAGE_SIZE)
    memory.write()
    machine = bench(memory)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(machine.vm, before, Stage2Leaves(0, 1))
    _logging(machine)
    kept = machine.vm.leaves() - before
    expect_equal(kept.bytes, HUGE_PAGE_SIZE, "bytes mapped after it was switched on")
    taken = expect_writes(machine.vcpu, memory, None)
    expect(taken > 0, "the guest's writes go unnoticed")
    expect_equal(len(machine.vm.dirty_pages(SLOT)), 512, "dirty pages")
    return f"logging on: {kept}; the guest's 512 writes take {taken} faults"


@case(
    "dirty/stop-recovers",
    "after logging is switched off, a prefault brings the 2 MiB leaf back",
    "x86.c:kvm_mmu_slot_apply_flags(): collapsible entries are zapped, or recovered in place",
    host.transparent_huge_pages,
    mapping=True,
)
def stop_recovers() -> str:
    memory = huge(HUGE_PAGE_SIZE)
    memory.write()
    machine = bench(memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(machine.vm, before, Stage2Leaves(512))
    _logging(machine, False)
    stopped = machine.vm.leaves() - before
    machine.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(machine.vm, before, Stage2Leaves(0, 1))
    expect_writes(machine.vcpu, memory, 0)
    return f"logging off leaves {stopped}"


@case(
    "dirty/start-keeps-4k",
    "switching logging on keeps 4 KiB leaves that were prefaulted, write-protected",
    "x86.c:kvm_mmu_slot_apply_flags()",
    mapping=True,
)
def start_keeps_4k() -> None:
    machine = bench()
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    _logging(machine)
    expect_mapped(machine.vm, before, Stage2Leaves(PAGES))
    expect_equal(machine.vm.dirty_pages(SLOT), set(), "dirty pages")
    expect_reads(machine.vcpu, machine.memory, 0)
    expect_writes(machine.vcpu, machine.memory, PAGES)
    expect_equal(machine.vm.dirty_pages(SLOT), set(range(PAGES)), "dirty pages")


class _Ring:
    """A vCPU's dirty ring: ``struct kvm_dirty_gfn`` {u32 flags, slot; u64 offset}."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.size = vcpu.vm.dirty_ring
        self.ring = mmap.mmap(vcpu.fd, self.size, offset=abi.DIRTY_RING_PAGE_OFFSET * PAGE_SIZE)

    def take(self) -> Iterator[tuple[int, int]]:
        """The (slot, page) pairs in it, which are marked as taken."""
        for at in range(0, self.size, abi.DIRTY_GFN_SIZE):
            flags, slot, offset = struct.unpack_from("<IIQ", self.ring, at)
            if flags & 3 == 1:  # KVM_DIRTY_GFN_F_DIRTY, not yet taken
                struct.pack_into("<I", self.ring, at, 2)
                yield slot, offset


@case(
    "dirty/ring-fills",
    "with a dirty ring, each page that is prefaulted writable takes an entry",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push()",
    host.dirty_ring,
    mapping=True,
)
def ring_fills() -> None:
    vm = Vm(dirty_ring=16 * PAGE_SIZE)
    machine = bench(vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = _Ring(machine.vcpu)
    list(ring.take())
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    machine.vcpu.prefault_all(GPA, machine.size)
    taken = [page for slot, page in ring.take() if slot == SLOT]
    expect_equal(sorted(taken), list(range(PAGES)), "pages in the ring")
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    expect_writes(machine.vcpu, machine.memory, PAGES)
    expect_equal(len(list(ring.take())), PAGES, "pages in the ring after the guest's writes")


@case(
    "dirty/ring-overflows",
    "a prefault bigger than the dirty ring overflows it: no error, and pages are lost to the log",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push() only warns; only KVM_RUN looks at soft_full",
    host.dirty_ring,
    mapping=True,
    harsh=True,
)
def ring_overflows() -> str:
    vm = Vm(dirty_ring=PAGE_SIZE)
    entries = PAGE_SIZE // abi.DIRTY_GFN_SIZE
    memory = small(2 * entries * PAGE_SIZE)
    memory.write()
    machine = bench(memory, vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = _Ring(machine.vcpu)
    result = machine.vcpu.prefault(GPA, memory.size)
    expect_equal(str(result), "success, 0x0 bytes left", "the ioctl")
    kept = len({page for slot, page in ring.take() if slot == SLOT})
    expect(0 < kept <= entries, f"{kept} pages in a ring of {entries}")
    return f"{memory.size // PAGE_SIZE} pages dirtied, {kept} in a ring of {entries}"
