# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty logging, which QEMU enables on a migration source and for video memory."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import abi, needs
from ..device import ioctl
from ..expectations import expect, expect_equal
from ..memory import small, thp
from ..suite import case
from ..vmm import KvmVcpu, KvmVm
from .common import (
    GPA,
    PAGES,
    SLOT,
    Fixture,
    expect_mapped,
    expect_reads,
    expect_writes,
    make_fixture,
)

_MARK = "mmu/spte.c:make_spte() marks a page dirty when it makes a writable entry for it"


def _logging(fixture: Fixture, on: bool = True) -> None:
    fixture.vm.slot(SLOT, GPA, fixture.memory, flags=abi.MEM_LOG_DIRTY_PAGES if on else 0)


@case(
    "dirty/log-marks-all",
    "with dirty logging, a prefault that maps a page writable marks the page dirty",
    _MARK,
    mapping=True,
)
def log_marks_all() -> None:
    fixture = make_fixture(flags=abi.MEM_LOG_DIRTY_PAGES)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages before the prefault")
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(range(PAGES)), "dirty pages")
    expect_reads(fixture.vcpu, fixture.memory, 0)


@case(
    "dirty/log-leaves-read-only-alone",
    "a prefault that maps a page read-only does not mark it dirty; the guest's first write does",
    _MARK,
    mapping=True,
)
def log_leaves_read_only_alone() -> None:
    fixture = make_fixture(small(PAGES * PAGE_SIZE), flags=abi.MEM_LOG_DIRTY_PAGES)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages")
    fixture.vcpu.write(GPA, 4, 9)
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1, 2, 3}, "dirty pages after four writes")


@case(
    "dirty/log-is-true-to-the-guest",
    "after the dirty log is read, it records new guest writes, even after another prefault",
    "virt/kvm/kvm_main.c:kvm_get_dirty_log_protect() makes the entries read-only again",
    mapping=True,
)
def log_is_true_to_the_guest() -> str:
    fixture = make_fixture(flags=abi.MEM_LOG_DIRTY_PAGES)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), PAGES, "dirty pages")
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages when read again")
    fixture.vcpu.write(GPA, 2, 5)
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1}, "dirty pages after two writes")
    fixture.vcpu.prefault_all(GPA, fixture.size)
    marked = len(fixture.vm.dirty_pages(SLOT))
    expect(marked in (0, PAGES), f"a second prefault marks {marked} pages")
    fixture.vcpu.write(GPA, 3, 6)
    after = fixture.vm.dirty_pages(SLOT)
    expect_equal(after, {0, 1, 2}, "dirty pages after three more writes")
    return f"a second prefault marks {marked} of {PAGES} pages"


@case(
    "dirty/log-forces-4k",
    "with dirty logging, a prefault maps huge pages with 4 KiB leaves",
    "mmu/mmu.c:kvm_mmu_hugepage_adjust(): kvm_slot_dirty_track_enabled()",
    needs.transparent_huge_pages,
    mapping=True,
)
def log_forces_4k() -> None:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512))
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), 512, "dirty pages")


@case(
    "dirty/start-splits",
    "enabling dirty logging splits prefaulted 2 MiB leaves, immediately or when the guest writes",
    "x86.c:kvm_mmu_slot_apply_flags()",
    needs.transparent_huge_pages,
    mapping=True,
)
def start_splits() -> str:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    _logging(fixture)
    kept = fixture.vm.leaves() - before
    expect_equal(kept.bytes, HUGE_PAGE_SIZE, "bytes mapped after logging was enabled")
    taken = expect_writes(fixture.vcpu, memory, None)
    expect(taken > 0, "the guest's writes took no faults")
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), 512, "dirty pages")
    return f"with logging enabled: {kept}; 512 writes of the guest take {taken} faults"


@case(
    "dirty/stop-recovers",
    "after dirty logging is disabled, a prefault maps the 2 MiB leaf again",
    "x86.c:kvm_mmu_slot_apply_flags(): collapsible entries are zapped, or recovered in place",
    needs.transparent_huge_pages,
    mapping=True,
)
def stop_recovers() -> str:
    memory = thp(HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory, flags=abi.MEM_LOG_DIRTY_PAGES)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512))
    _logging(fixture, False)
    stopped = fixture.vm.leaves() - before
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0, 1))
    expect_writes(fixture.vcpu, memory, 0)
    return f"after logging is disabled: {stopped}"


@case(
    "dirty/start-keeps-4k",
    "enabling dirty logging keeps prefaulted 4 KiB leaves and write-protects them",
    "x86.c:kvm_mmu_slot_apply_flags()",
    mapping=True,
)
def start_keeps_4k() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    _logging(fixture)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages")
    expect_reads(fixture.vcpu, fixture.memory, 0)
    expect_writes(fixture.vcpu, fixture.memory, PAGES)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(range(PAGES)), "dirty pages")


class _Ring:
    """The dirty ring of a vCPU.

    Its entries are ``struct kvm_dirty_gfn`` {u32 flags, slot; u64 offset}.
    """

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.size = vcpu.vm.dirty_ring
        self.ring = mmap.mmap(vcpu.fd, self.size, offset=abi.DIRTY_RING_PAGE_OFFSET * PAGE_SIZE)

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield the (slot, page) pairs of the ring and mark them as collected."""
        for at in range(0, self.size, abi.DIRTY_GFN_SIZE):
            flags, slot, offset = struct.unpack_from("<IIQ", self.ring, at)
            if flags & 3 == 1:  # KVM_DIRTY_GFN_F_DIRTY, not yet collected
                struct.pack_into("<I", self.ring, at, 2)
                yield slot, offset


@case(
    "dirty/ring-fills",
    "a prefault adds an entry to the dirty ring for each page that it maps writable",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push()",
    needs.dirty_ring,
    mapping=True,
)
def ring_fills() -> None:
    vm = KvmVm(dirty_ring=16 * PAGE_SIZE)
    fixture = make_fixture(vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = _Ring(fixture.vcpu)
    list(ring.take())
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    taken = [page for slot, page in ring.take() if slot == SLOT]
    expect_equal(sorted(taken), list(range(PAGES)), "pages in the ring")
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    expect_writes(fixture.vcpu, fixture.memory, PAGES)
    expect_equal(len(list(ring.take())), PAGES, "pages in the ring after the guest's writes")


@case(
    "dirty/ring-overflows",
    "a prefault of more pages than the dirty ring can hold succeeds, but entries are lost",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push() only warns; only KVM_RUN checks soft_full()",
    needs.dirty_ring,
    mapping=True,
    destructive=True,
)
def ring_overflows() -> str:
    vm = KvmVm(dirty_ring=PAGE_SIZE)
    entries = PAGE_SIZE // abi.DIRTY_GFN_SIZE
    memory = small(2 * entries * PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory, vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = _Ring(fixture.vcpu)
    result = fixture.vcpu.prefault(GPA, memory.size)
    expect_equal(str(result), "success, 0x0 bytes left", "the ioctl")
    kept = len({page for slot, page in ring.take() if slot == SLOT})
    expect(0 < kept <= entries, f"{kept} pages in a ring of {entries}")
    return f"{memory.size // PAGE_SIZE} pages marked dirty, {kept} recorded in a ring of {entries}"
