# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about partial results, signals, and the kernel's own selftest."""

from __future__ import annotations

from ...units import GIB, HUGE_PAGE_SIZE, MIB, PAGE_SIZE
from .. import abi, needs
from ..device import offers_prefault
from ..expectations import error_name, expect, expect_equal
from ..guest_code import COUNT
from ..memory import Userfault, small, thp
from ..suite import add, case
from ..threads import BackgroundCall, RunningVcpu
from ..vmm import COUNTER, LONG64, KvmVm
from .common import (
    GPA,
    PAGES,
    SLOT,
    expect_faults,
    expect_reads,
    expect_writes,
    make_fixture,
)

_LOOP = "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()"


@case(
    "progress/whole-slot",
    "one ioctl maps a whole slot of 16 MiB with 4 KiB leaves",
    _LOOP,
    mapping=True,
)
def whole_slot() -> None:
    memory = small(16 * MIB)
    memory.populate()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, memory.size)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    grown = fixture.vm.leaves() - before
    expect_equal(grown.pages_4k, memory.size // PAGE_SIZE, "pages mapped")
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "progress/past-the-slot",
    "if a range extends past the slot, the first ioctl maps the slot, and the next ioctl fails "
    "with ENOENT",
    _LOOP,
    mapping=True,
)
def past_the_slot() -> None:
    fixture = make_fixture()
    result = fixture.vcpu.prefault(GPA, fixture.size + 4 * PAGE_SIZE)
    expect_equal(
        str(result), f"success, {4 * PAGE_SIZE:#x} bytes left", "result of the first ioctl"
    )
    result = fixture.vcpu.prefault(GPA + fixture.size, 4 * PAGE_SIZE)
    expect_equal(
        str(result), f"ENOENT, {4 * PAGE_SIZE:#x} bytes left", "result of the second ioctl"
    )
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "progress/adjacent-slots",
    "one ioctl can map two slots if the slots are adjacent",
    _LOOP,
    mapping=True,
)
def adjacent_slots() -> None:
    fixture = make_fixture()
    second = small(PAGES * PAGE_SIZE)
    second.write()
    fixture.vm.slot(2, GPA + fixture.size, second)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, fixture.size + second.size)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_equal((fixture.vm.leaves() - before).bytes, 2 * PAGES * PAGE_SIZE, "bytes mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)
    expect_reads(fixture.vcpu, second, 0, gpa=GPA + fixture.size)


@case(
    "progress/huge-steps",
    "if a range starts inside one huge page and ends inside the next, the ioctl maps both huge "
    "pages with 2 MiB leaves",
    "mmu/mmu.c:kvm_arch_vcpu_pre_fault_memory()",
    needs.transparent_huge_pages,
    mapping=True,
)
def huge_steps() -> None:
    memory = thp(2 * HUGE_PAGE_SIZE)
    memory.write()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA + HUGE_PAGE_SIZE - PAGE_SIZE, 2 * PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_equal((fixture.vm.leaves() - before).pages_2m, 2, "2 MiB leaves")
    expect_writes(fixture.vcpu, memory, 0)


@case(
    "progress/signal-in-the-middle",
    "if a signal arrives after the first page is mapped, the ioctl returns 0, and the size field "
    "contains the number of remaining bytes",
    "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory() checks signal_pending() once per page",
    mapping=True,
)
def signal_in_the_middle() -> None:
    # A prefault of 256 MiB takes about 1 s under emulation and about 10 ms on hardware.
    memory = small(256 * MIB)
    memory.populate()
    fixture = make_fixture(memory)
    before = fixture.vm.leaves()
    for limit in (0.004, 0.001, 0.0002):
        result = fixture.vcpu.prefault(GPA, memory.size, limit=limit)
        done = memory.size - result.left
        # The legacy MMU also maps pages next to the last page.
        extra = (fixture.vm.leaves() - before).bytes - done
        expect(
            0 <= extra < 8 * PAGE_SIZE, f"KVM mapped {extra:#x} more bytes than the ioctl reported"
        )
        if result.left:
            break
        fixture.vm.delete(SLOT)
        fixture.vm.slot(SLOT, GPA, memory)
        fixture.vcpu.warm()
        before = fixture.vm.leaves()
    expect(result.left > 0, "no signal interrupted the ioctl, even with a limit of 0.2 ms")
    if done:
        expect_equal(error_name(result.error), "success", "result of the ioctl")
        taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, done // PAGE_SIZE))
        expect_faults(
            taken,
            0,
            done // PAGE_SIZE,
            "faults taken by the guest on the pages that the ioctl reported",
        )
    fixture.vcpu.prefault_all(GPA + done, result.left)
    expect_equal(
        (fixture.vm.leaves() - before).bytes,
        memory.size,
        "bytes mapped after the last prefault",
    )


@case(
    "progress/interrupted-waiting-for-a-page",
    "if a signal arrives while the ioctl waits for userfaultfd, the ioctl fails with EINTR, and a "
    "later prefault succeeds",
    "virt/kvm/kvm_main.c:hva_to_pfn_slow() (FOLL_INTERRUPTIBLE), kvm_handle_signal_exit()",
    needs.root,
)
def interrupted_waiting() -> None:
    memory = small(PAGES * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory, written=False)
    before, exits = fixture.vm.leaves(), fixture.vcpu.stat("signal_exits")
    result = fixture.vcpu.prefault(GPA, memory.size, limit=0.05)
    expect_equal(str(result), f"EINTR, {memory.size:#x} bytes left", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    expect(fixture.vcpu.stat("signal_exits") > exits, "signal_exits has not increased")
    expect_equal(fixture.vcpu.exit_reason, abi.EXIT_INTR, "exit reason in kvm_run")
    userfault.resolve(0, memory.size)
    fixture.vcpu.prefault_all(GPA, memory.size)
    expect_reads(fixture.vcpu, memory, 0)


@case(
    "progress/waits-for-a-page",
    "the ioctl blocks on a missing page until the userfaultfd handler resolves the fault, and then "
    "continues",
    "fs/userfaultfd.c:handle_userfault()",
    needs.root,
    mapping=True,
)
def waits_for_a_page() -> None:
    memory = small(4 * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory, written=False)
    if not offers_prefault():
        userfault.resolve(0, memory.size)
        fixture.vcpu.prefault(GPA, PAGE_SIZE)
    task = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size))
    for number in range(4):
        expect_equal(
            userfault.wait(), number * PAGE_SIZE, "offset of the page for which the ioctl waits"
        )
        expect(task.is_alive(), "the ioctl returned before the page was resolved")
        userfault.resolve(number * PAGE_SIZE)
    expect_equal(str(task.result()), "success, 0x0 bytes left", "result of the ioctl")
    expect_reads(fixture.vcpu, memory, 0)


@case(
    "progress/blocks-slot-changes",
    "a running ioctl blocks the deletion of any slot, because the ioctl is one SRCU read-side "
    "critical section",
    "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory() (srcu_read_lock), kvm_swap_active_memslots()",
    needs.root,
    needs.capability,
)
def blocks_slot_changes() -> None:
    memory = small(4 * PAGE_SIZE)
    userfault = Userfault(memory)
    fixture = make_fixture(memory, written=False)
    other = small(PAGE_SIZE)
    fixture.vm.slot(2, 2 * GIB, other)
    prefault = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, memory.size))
    userfault.wait()
    deleter = BackgroundCall(lambda: fixture.vm.delete(2))
    deleter.wait_state("D")
    expect(prefault.is_alive(), "the ioctl returned before the page was resolved")
    userfault.resolve(0, memory.size)
    expect_equal(str(prefault.result()), "success, 0x0 bytes left", "result of the ioctl")
    deleter.result()
    fixture.vcpu.warm()
    expect_reads(fixture.vcpu, memory, None)


@case(
    "progress/page-by-page",
    "one ioctl per page produces the same result as one ioctl for the range",
    _LOOP,
    mapping=True,
)
def page_by_page() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    for page in range(PAGES):
        fixture.vcpu.prefault_all(GPA + page * PAGE_SIZE, PAGE_SIZE)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "progress/backwards",
    "prefaults of ranges in descending order map all pages",
    _LOOP,
    mapping=True,
)
def backwards() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    for page in reversed(range(0, PAGES, 4)):
        fixture.vcpu.prefault_all(GPA + page * PAGE_SIZE, 4 * PAGE_SIZE)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "progress/counts-no-guest-faults",
    "KVM does not count a prefault in pf_taken, which counts only the guest's faults",
    "mmu/mmu.c:kvm_mmu_page_fault() counts faults, but kvm_mmu_do_page_fault() with prefetch does "
    "not",
    needs.capability,
)
def counts_no_guest_faults() -> None:
    fixture = make_fixture()
    names = ("pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "exits")
    before = fixture.vcpu.stats.read(*names)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(fixture.vcpu.stats.read(*names), before, f"{', '.join(names)}")


def _selftest(kind: int) -> None:
    """Issue the ioctls of pre_fault_memory_test.c, and also check the mappings.

    The slot has a size of 2 MiB plus one page, and an address near the highest gfn.
    """
    vm = KvmVm(kind)
    vcpu = vm.vcpu(mode=LONG64)
    size = HUGE_PAGE_SIZE + PAGE_SIZE
    at = (1 << 39) - 2 * HUGE_PAGE_SIZE
    memory = small(2 * HUGE_PAGE_SIZE)
    memory.write()
    vm.slot(SLOT, at, memory, size=size)
    vcpu.warm()
    before = vm.leaves()
    result = vcpu.prefault(at, HUGE_PAGE_SIZE)
    expect_equal(
        str(result),
        "success, 0x0 bytes left",
        "ioctl for the first 2 MiB",
    )
    result = vcpu.prefault(at + HUGE_PAGE_SIZE, 2 * PAGE_SIZE)
    expect_equal(
        str(result),
        f"success, {PAGE_SIZE:#x} bytes left",
        "ioctl across the end of the slot",
    )
    result = vcpu.prefault(at + HUGE_PAGE_SIZE + PAGE_SIZE, PAGE_SIZE)
    expect_equal(
        str(result),
        f"ENOENT, {PAGE_SIZE:#x} bytes left",
        "ioctl after the slot",
    )
    expect_equal((vm.leaves() - before).bytes, size, "bytes mapped")
    count = size // PAGE_SIZE
    total = sum(memory.words()[:count]) & 0xFFFFFFFF
    taken = vcpu.stat("pf_taken")
    expect_equal(vcpu.read(at, count), total, "sum of the words that the guest read")
    expect_faults(vcpu.stat("pf_taken") - taken, 0, count, "faults taken by the guest")


for name, kind, required in (
    ("default-vm", abi.VM_DEFAULT, ()),
    ("sw-protected-vm", abi.VM_SW_PROTECTED, (needs.software_protected,)),
):
    add(
        f"progress/selftest-{name}",
        "the ioctls of the kernel's pre_fault_memory_test return the expected results and map the "
        "memory",
        "tools/testing/selftests/kvm/pre_fault_memory_test.c",
        lambda kind=kind: _selftest(kind),  # type: ignore[misc]
        *required,
        mapping=True,
    )


@case(
    "progress/signal-while-waiting-for-the-vcpu",
    "if a signal arrives while the ioctl waits for a running vCPU, the ioctl fails with EINTR and "
    "maps no page",
    "virt/kvm/kvm_main.c:kvm_vcpu_ioctl() (mutex_lock_killable), kvm_vcpu_pre_fault_memory()",
    needs.capability,
)
def signal_while_waiting() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    with RunningVcpu(fixture.vcpu, COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        task = BackgroundCall(lambda: fixture.vcpu.prefault(GPA, fixture.size))
        task.wait_state("D")
        task.interrupt()
        expect(task.is_alive(), "the signal ended the wait for the vCPU")
        running.wait_progress()
    expect_equal(str(task.result()), f"EINTR, {fixture.size:#x} bytes left", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    fixture.vcpu.kick(False)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0)
