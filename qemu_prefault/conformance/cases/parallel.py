# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that prefault on several vCPUs concurrently.

The vCPUs prefault the same range, or separate parts of a range.
"""

from __future__ import annotations

from ...units import MIB, PAGE_SIZE
from .. import guest_code
from ..expectations import expect, expect_equal
from ..features import has_ad_bits
from ..memory import small
from ..suite import add
from ..threads import BackgroundCall, RunningVcpu
from ..vmm import COUNTER, KvmVm
from .common import GPA, SLOT, expect_reads, expect_writes

_LOCK = (
    "mmu/mmu.c:kvm_tdp_mmu_page_fault() takes mmu_lock for reading, so vCPUs run in parallel, but "
    "the legacy MMU takes mmu_lock for writing"
)
_SIZE = 4 * MIB


def _parallel(count: int, stripes: bool, with_guest: bool) -> None:
    memory = small(_SIZE)
    memory.write()
    vm = KvmVm()
    vcpus = [vm.vcpu() for _ in range(count)]
    reader = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    for vcpu in (*vcpus, reader):
        vcpu.warm()
    before = vm.leaves()
    stripe = _SIZE // count & -PAGE_SIZE
    parts = [
        (GPA + n * stripe, stripe if n < count - 1 else _SIZE - n * stripe) if stripes
        else (GPA, _SIZE)
        for n in range(count)
    ]  # fmt: skip

    def all_at_once() -> None:
        tasks = [
            BackgroundCall(lambda vcpu=vcpu, part=part: vcpu.prefault_all(*part))  # type: ignore[misc]
            for vcpu, part in zip(vcpus, parts, strict=True)
        ]
        for task in tasks:
            task.result()

    if with_guest:
        start = memory.words()
        pages = _SIZE // PAGE_SIZE
        registers = {"rbp": GPA, "rdi": pages, "rdx": PAGE_SIZE, "rax": 1, "rbx": COUNTER}
        with RunningVcpu(reader, guest_code.ROUNDS, **registers) as running:
            running.wait_progress()
            all_at_once()
            running.wait_progress()
        rounds = vm.counter
        grown = {now - then for now, then in zip(memory.words(), start, strict=True)}
        expect(
            grown <= {rounds, rounds + 1},
            f"the guest counted {rounds} passes, but the words have increased by {grown}",
        )
        reader.kick(False)
    else:
        all_at_once()
    expect_equal((vm.leaves() - before).pages_4k, _SIZE // PAGE_SIZE, "pages mapped")
    # Without A/D bits, a prefault makes a leaf accessible that another vCPU has prefaulted before.
    # If all vCPUs prefault the same range, the number of such leaves varies.
    varies = not (stripes or with_guest or has_ad_bits())
    expect_reads(vcpus[0], memory, None if varies else 0, first=0 if with_guest else None)
    for vcpu in (*vcpus[1:], reader):
        expect_reads(vcpu, memory, 0, first=0)
    expect_writes(reader, memory, 0, first=0 if with_guest else None)


for count in (2, 3, 4):
    for stripes in (False, True):
        for with_guest in (False, True):
            where = "stripes" if stripes else "one-range"
            what = "separate parts of a slot" if stripes else "the same range"
            guest_text = " while a guest writes to every page" if with_guest else ""
            add(
                f"parallel/{count}-{where}{'-with-guest' if with_guest else ''}",
                f"if {count} vCPUs prefault {what} concurrently{guest_text}, "
                "KVM maps each page once",
                _LOCK,
                lambda count=count, stripes=stripes, with_guest=with_guest: _parallel(  # type: ignore[misc]
                    count, stripes, with_guest
                ),
                # If the guest accesses all memory, KVM maps this memory even without a prefault.
                mapping=not with_guest,
            )
