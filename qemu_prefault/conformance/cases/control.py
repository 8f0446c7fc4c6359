# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that count the faults of a guest without a prefault.

The results of these cases show which faults a prefault avoids in the other cases.
"""

from __future__ import annotations

from collections.abc import Callable

from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import needs
from ..expectations import expect
from ..memory import Memory, hugetlb, memfd, small, thp
from ..suite import Need, add
from ..vmm import LONG64, KvmVm
from .common import GPA, PAGES, expect_reads, expect_writes, make_fixture

_SOURCE = "mmu/mmu.c:kvm_mmu_page_fault() counts pf_taken"


def _faults(make: Callable[[], Memory], most: int, writes: bool) -> None:
    memory = make()
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    check = expect_writes if writes else expect_reads
    taken = fixture.vcpu.stat("pf_taken")
    check(fixture.vcpu, memory, None)
    taken = fixture.vcpu.stat("pf_taken") - taken
    # The legacy MMU maps up to 8 neighbouring pages in one fault (direct_pte_prefetch()).
    expect(
        most / 8 <= taken <= most, f"the guest took {taken} faults, expected {most / 8:g} to {most}"
    )
    grown = fixture.vm.leaves() - before
    expect(
        grown.bytes >= memory.size,
        f"KVM mapped only {grown}, expected at least {memory.size} bytes",
    )
    if writes:
        expect_writes(fixture.vcpu, memory, 0, first=0)
    else:
        expect_reads(fixture.vcpu, memory, 0, first=0)


for name, make, most, required in (
    ("4k", lambda: small(PAGES * PAGE_SIZE), PAGES, ()),
    ("thp", lambda: thp(HUGE_PAGE_SIZE), 1, (needs.transparent_huge_pages,)),
    ("memfd", lambda: memfd(PAGES * PAGE_SIZE), PAGES, ()),
    ("hugetlb", lambda: hugetlb(HUGE_PAGE_SIZE, shared=True), 1, (needs.hugetlb_2m,)),
):
    for writes in (False, True):
        # This guest does not use paging. Even with shadow paging, KVM's tables for this guest are
        # therefore direct and contain huge pages.
        requirements: tuple[Need, ...] = required
        verb = "writes to" if writes else "reads"
        add(
            f"control/{name}-{'write' if writes else 'read'}",
            f"without a prefault, the guest takes faults when it first {verb} the memory, but no "
            f"faults when it {verb} the memory again",
            _SOURCE,
            lambda make=make, most=most, writes=writes: _faults(make, most, writes),  # type: ignore[misc]
            *requirements,
        )


def _faults_with_paging() -> None:
    """Check the faults of a guest in 64-bit mode with its own page tables."""
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu(mode=LONG64)
    vm.slot(1, GPA, memory)
    vcpu.warm()
    before = vcpu.stat("pf_taken")
    expect_reads(vcpu, memory, None)
    expect(vcpu.stat("pf_taken") > before, "the guest's first reads took no fault")
    expect_reads(vcpu, memory, 0, first=0)
    expect_writes(vcpu, memory, None)
    expect_writes(vcpu, memory, 0, first=0)


add(
    "control/long-mode",
    "a guest with its own page tables takes faults only when it first reads or writes the memory",
    _SOURCE,
    _faults_with_paging,
)
