# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about dirty logging.

QEMU enables dirty logging on the source of a migration, and for video memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import abi, needs
from ..device import ioctl
from ..expectations import expect, expect_equal
from ..features import has_ad_bits, logs_dirty_pages
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

_MARK = "mmu/spte.c:make_spte() marks the page dirty if the new SPTE is writable"


_NOTHING_MARKED = "without A/D bits, the prefault marks no page"


def _marked(pages: int) -> int:
    """Return how many of a number of writable pages a prefault marks as dirty.

    Without A/D bits, mmu/spte.c:make_spte() makes a prefaulted entry inaccessible before it checks
    whether the entry is writable.
    """
    return pages if has_ad_bits() else 0


def _logging(fixture: Fixture, on: bool = True) -> None:
    fixture.vm.slot(SLOT, GPA, fixture.memory, flags=abi.MEM_LOG_DIRTY_PAGES if on else 0)


@case(
    "dirty/log-marks-all",
    "if dirty logging is enabled, a prefault that maps a page writable also marks the page dirty",
    _MARK,
    mapping=True,
)
def log_marks_all() -> str | None:
    fixture = make_fixture(flags=abi.MEM_LOG_DIRTY_PAGES)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages before the prefault")
    fixture.vcpu.prefault_all(GPA, fixture.size)
    marked = _marked(PAGES)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(range(marked)), "dirty pages")
    expect_reads(fixture.vcpu, fixture.memory, 0)
    return None if marked else _NOTHING_MARKED


@case(
    "dirty/log-leaves-read-only-alone",
    "a prefault that maps a page read-only does not mark the page dirty, but the guest's first "
    "write marks it",
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
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1, 2, 3}, "dirty pages after four guest writes")


@case(
    "dirty/log-is-true-to-the-guest",
    "after the VMM has read the dirty log, KVM logs the guest's new writes, even if the pages are "
    "prefaulted again",
    "virt/kvm/kvm_main.c:kvm_get_dirty_log_protect() makes the entries read-only again",
    mapping=True,
)
def log_is_true_to_the_guest() -> str:
    fixture = make_fixture(flags=abi.MEM_LOG_DIRTY_PAGES)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), _marked(PAGES), "dirty pages")
    expect_equal(fixture.vm.dirty_pages(SLOT), set(), "dirty pages after the log was read")
    fixture.vcpu.write(GPA, 2, 5)
    expect_equal(fixture.vm.dirty_pages(SLOT), {0, 1}, "dirty pages after two guest writes")
    fixture.vcpu.prefault_all(GPA, fixture.size)
    marked = len(fixture.vm.dirty_pages(SLOT))
    expect(marked in (0, PAGES), f"a second prefault marked {marked} pages, expected 0 or {PAGES}")
    fixture.vcpu.write(GPA, 3, 6)
    after = fixture.vm.dirty_pages(SLOT)
    expect_equal(after, {0, 1, 2}, "dirty pages after three more writes")
    return f"a second prefault marks {marked} of {PAGES} pages"


@case(
    "dirty/log-forces-4k",
    "if dirty logging is enabled, a prefault maps huge pages with 4 KiB leaves",
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
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), _marked(512), "dirty pages")


@case(
    "dirty/start-splits",
    "if dirty logging is enabled after a prefault, KVM splits the 2 MiB leaves immediately or when "
    "the guest writes",
    "x86.c:kvm_mmu_slot_apply_flags(); with PML, KVM clears dirty bits instead of write-protecting",
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
    expect(taken > 0 or logs_dirty_pages(), "the guest's writes took no faults")
    expect_equal(len(fixture.vm.dirty_pages(SLOT)), 512, "dirty pages")
    return f"with logging enabled: {kept}; the guest's 512 writes take {taken} faults"


@case(
    "dirty/stop-recovers",
    "after dirty logging is disabled, a prefault maps huge pages with 2 MiB leaves again",
    "x86.c:kvm_mmu_slot_apply_flags() zaps collapsible entries or recovers them in place",
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
    "if dirty logging is enabled after a prefault, KVM keeps the 4 KiB leaves, and write-protects "
    "them unless the CPU logs dirty pages",
    "x86.c:kvm_mmu_slot_apply_flags(); with PML, kvm_mmu_slot_leaf_clear_dirty()",
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
    expect_writes(fixture.vcpu, fixture.memory, 0 if logs_dirty_pages() else PAGES)
    expect_equal(fixture.vm.dirty_pages(SLOT), set(range(PAGES)), "dirty pages")


class DirtyRing:
    """The dirty ring of a vCPU.

    Each entry is a ``struct kvm_dirty_gfn`` with the fields u32 flags, u32 slot and u64 offset.
    """

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.size = vcpu.vm.dirty_ring
        self.ring = mmap.mmap(vcpu.fd, self.size, offset=abi.DIRTY_RING_PAGE_OFFSET * PAGE_SIZE)

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield the slot and page of each dirty entry, and mark the entry as collected."""
        for at in range(0, self.size, abi.DIRTY_GFN_SIZE):
            flags, slot, offset = struct.unpack_from("<IIQ", self.ring, at)
            if flags & 3 == 1:  # KVM_DIRTY_GFN_F_DIRTY, not yet collected
                struct.pack_into("<I", self.ring, at, 2)
                yield slot, offset


@case(
    "dirty/ring-fills",
    "KVM adds an entry to the dirty ring for each page that a prefault maps writable",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push()",
    needs.dirty_ring,
    mapping=True,
)
def ring_fills() -> str | None:
    vm = KvmVm(dirty_ring=16 * PAGE_SIZE)
    fixture = make_fixture(vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = DirtyRing(fixture.vcpu)
    list(ring.take())
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    taken = [page for slot, page in ring.take() if slot == SLOT]
    marked = _marked(PAGES)
    expect_equal(sorted(taken), list(range(marked)), "pages in the ring")
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    expect_writes(fixture.vcpu, fixture.memory, 0 if logs_dirty_pages() else PAGES)
    expect_equal(len(list(ring.take())), PAGES, "entries in the ring after the writes")
    return None if marked else _NOTHING_MARKED


@case(
    "dirty/ring-overflows",
    "if a prefault maps more pages than the dirty ring can hold, the ioctl succeeds, but KVM "
    "overwrites entries",
    "virt/kvm/dirty_ring.c:kvm_dirty_ring_push() warns and does not fail, and only KVM_RUN checks "
    "kvm_dirty_ring_soft_full()",
    needs.dirty_ring,
    mapping=True,
    destructive=True,
)
def ring_overflows() -> str:
    # With PML, KVM reserves more entries (dirty_ring.c:kvm_dirty_ring_get_rsvd_entries()).
    size = (4 if logs_dirty_pages() else 1) * PAGE_SIZE
    vm = KvmVm(dirty_ring=size)
    entries = size // abi.DIRTY_GFN_SIZE
    memory = small(2 * entries * PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory, vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    ring = DirtyRing(fixture.vcpu)
    result = fixture.vcpu.prefault(GPA, memory.size)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    kept = len({page for slot, page in ring.take() if slot == SLOT})
    if not _marked(entries):
        expect_equal(kept, 0, "pages in the ring")
        return _NOTHING_MARKED
    expect(0 < kept <= entries, f"a ring of {entries} entries contains {kept} pages")
    count = memory.size // PAGE_SIZE
    return f"{count} pages marked dirty, {kept} recorded in a ring of {entries} entries"
