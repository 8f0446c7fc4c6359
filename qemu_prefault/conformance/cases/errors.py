# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about the conditions for each errno, and the effects of a failed ioctl."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable

from ..._native import ffi, lib
from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import abi, needs
from ..device import ioctl, kvm_fd
from ..expectations import error_name, expect, expect_equal
from ..features import has_ad_bits, virtualizes_apic
from ..guest_code import READ_32
from ..memory import HWPOISON, PROT_NONE, PROT_READ, memfd, small
from ..suite import Skip, add, case
from ..vmm import IoctlResult, KvmVm
from .common import GPA, PAGES, Fixture, expect_faults, expect_mapped, expect_reads, make_fixture

_CHECKS = "virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()"
_APIC = 0xFEE00000
_HOLE = "mmu/mmu.c:kvm_tdp_map_page() returns ENOENT for RET_PF_EMULATE"


def _unharmed(fixture: Fixture) -> None:
    """Check that the guest can still read the memory.

    If a prefault succeeds, the guest must read the memory without faults.
    """
    if fixture.vcpu.prefault(GPA, fixture.size, any_error=True).error == 0:
        expect_reads(fixture.vcpu, fixture.memory, 0)
    expect_reads(fixture.vcpu, fixture.memory, None)


def _invalid(gpa: int, size: int, flags: int) -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(gpa, size, flags=flags, any_error=True)
    expect_equal(str(result), str(IoctlResult(errno.EINVAL, size, 0)), "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    _unharmed(fixture)


for name, what, gpa, size, flags in (
    ("gpa-unaligned", "gpa is not page-aligned", GPA + 1, PAGE_SIZE, 0),
    ("gpa-unaligned-half", "gpa is aligned to half a page", GPA + 2048, PAGE_SIZE, 0),
    ("size-unaligned", "size is not page-aligned", GPA, PAGE_SIZE + 1, 0),
    ("size-below-a-page", "size is half a page", GPA, 2048, 0),
    ("size-zero", "size is 0", GPA, 0, 0),
    ("wraps", "gpa + size is greater than 2**64", 2**64 - PAGE_SIZE, 2 * PAGE_SIZE, 0),
    ("ends-at-2-64", "gpa + size is 2**64", 2**64 - PAGE_SIZE, PAGE_SIZE, 0),
    ("flag-1", "bit 0 of flags is set", GPA, PAGE_SIZE, 1),
    ("flag-63", "bit 63 of flags is set", GPA, PAGE_SIZE, 1 << 63),
):
    add(
        f"errors/einval-{name}",
        f"if {what}, the ioctl fails with EINVAL, maps no page and does not change the size field",
        _CHECKS,
        lambda gpa=gpa, size=size, flags=flags: _invalid(gpa, size, flags),  # type: ignore[misc]
    )


@case(
    "errors/padding-ignored",
    "the kernel ignores the padding of struct kvm_pre_fault_memory",
    _CHECKS,
    mapping=True,
)
def padding_ignored() -> None:
    fixture = make_fixture()
    result = fixture.vcpu.prefault(GPA, fixture.size, padding=2**64 - 1)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_reads(fixture.vcpu, fixture.memory, 0)


def _bad_pointer(address: int) -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    answer = lib.pf_vmm_ioctl(fixture.vcpu.fd, abi.PRE_FAULT_MEMORY, address)
    expect_equal(error_name(-answer), "EFAULT", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    _unharmed(fixture)


for name, address in (("null", 0), ("kernel", 0xFFFF800000000000)):
    add(
        f"errors/efault-pointer-{name}",
        "the ioctl fails with EFAULT if the kernel cannot read struct kvm_pre_fault_memory",
        "virt/kvm/kvm_main.c:kvm_vcpu_ioctl()",
        lambda address=address: _bad_pointer(address),  # type: ignore[misc]
        needs.known_ioctl,
    )


@case(
    "errors/efault-structure-read-only",
    "if the kernel cannot write struct kvm_pre_fault_memory back, the ioctl fails with EFAULT, "
    "although KVM has mapped the pages",
    "virt/kvm/kvm_main.c:kvm_vcpu_ioctl() calls copy_to_user() last",
    needs.capability,
)
def structure_read_only() -> None:
    fixture = make_fixture()
    page = small(PAGE_SIZE)
    page.put(0, struct.pack("<8Q", GPA, fixture.size, *[0] * 6))
    page.protect(PROT_READ)
    before = fixture.vm.leaves()
    answer = lib.pf_vmm_ioctl(fixture.vcpu.fd, abi.PRE_FAULT_MEMORY, page.address)
    expect_equal(error_name(-answer), "EFAULT", "result of the ioctl")
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)


def _efault(spoil: Callable[[Fixture], None], first: int) -> None:
    """Check that the ioctl maps the pages before ``first`` and fails with EFAULT.

    :param spoil: A function that makes page ``first`` and all later pages inaccessible.
    :param first: The index of a page in the slot.
    """
    fixture = make_fixture(memfd(PAGES * PAGE_SIZE))
    fixture.memory.write()
    spoil(fixture)
    before = fixture.vm.leaves()
    bad = (PAGES - first) * PAGE_SIZE
    result = fixture.vcpu.prefault(GPA, fixture.size)
    expect_equal(str(result), f"success, {bad:#x} bytes left", "result of the first ioctl")
    expect_equal((fixture.vm.leaves() - before).pages_4k, first, "pages mapped")
    result = fixture.vcpu.prefault(GPA + first * PAGE_SIZE, bad)
    expect_equal(str(result), f"EFAULT, {bad:#x} bytes left", "result of the second ioctl")
    expect_equal(
        (fixture.vm.leaves() - before).pages_4k,
        first,
        "pages mapped after the second ioctl",
    )
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, first))
    expect_faults(taken, 0, first, "faults taken by the guest on mapped pages")


_HALF = PAGES // 2 * PAGE_SIZE
for name, what, spoil in (
    ("unmapped", "not mapped in the process", lambda m: m.memory.unmap(_HALF)),
    ("prot-none", "protected with PROT_NONE", lambda m: m.memory.protect(PROT_NONE, _HALF)),
    ("past-eof", "beyond the end of the file", lambda m: os.truncate(m.memory.fd, _HALF)),
):
    add(
        f"errors/efault-{name}",
        f"the ioctl maps the pages before a page that is {what}, and fails with EFAULT if the "
        "range starts at this page",
        "mmu/mmu.c:kvm_handle_error_pfn(), KVM_PFN_ERR_FAULT",
        lambda spoil=spoil: _efault(spoil, PAGES // 2),  # type: ignore[misc]
        mapping=True,
    )


def _enoent(gpa: int, irqchip: bool = False) -> None:
    fixture = make_fixture(vm=KvmVm(irqchip=irqchip))
    before = fixture.vm.leaves()
    holes = fixture.vcpu.stat("pf_mmio_spte_created")
    result = fixture.vcpu.prefault(gpa, 4 * PAGE_SIZE)
    expect_equal(str(result), f"ENOENT, {4 * PAGE_SIZE:#x} bytes left", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    expect(
        fixture.vcpu.stat("pf_mmio_spte_created") - holes <= 1,
        "KVM created more than one MMIO entry",
    )
    _unharmed(fixture)


for name, gpa in (
    ("hole", GPA - 64 * PAGE_SIZE),
    ("behind-the-slot", GPA + PAGES * PAGE_SIZE),
    ("above-4g", 64 << 30),
    ("max-gfn", (1 << 39)),
):
    add(
        f"errors/enoent-{name}",
        "the ioctl fails with ENOENT if no memory slot covers the address",
        _HOLE,
        lambda gpa=gpa: _enoent(gpa),  # type: ignore[misc]
    )


@case(
    "errors/enoent-beyond-maxphyaddr",
    "the ioctl fails with ENOENT if no memory slot covers the address",
    _HOLE,
)
def beyond_maxphyaddr() -> str | None:
    gpa = 1 << 51
    fixture = make_fixture()
    before = fixture.vm.leaves()
    if has_ad_bits() or fixture.vcpu.prefault(gpa, PAGE_SIZE).error:
        _enoent(gpa)
        return None
    # mmu/mmu.c:page_fault_can_be_fast() lets fast_page_fault() handle an absent page if A/D bits
    # are off. Tables with four levels translate 48 bits, so fast_page_fault() finds the entry of
    # address 0, which the guest can read, and reports a spurious fault.
    result = fixture.vcpu.prefault(gpa, 4 * PAGE_SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    _unharmed(fixture)
    return "without A/D bits, success for an address beyond MAXPHYADDR, but KVM maps nothing"


@case(
    "errors/enoent-makes-mmio-entry",
    "a prefault outside all slots creates an MMIO entry, which KVM uses for the guest's next "
    "access to this address",
    "mmu/tdp_mmu.c:tdp_mmu_map_handle_target_level(): pf_mmio_spte_created",
    needs.capability,
    mapping=True,
)
def makes_mmio_entry() -> None:
    fixture = make_fixture()
    created = fixture.vcpu.stat("pf_mmio_spte_created")
    result = fixture.vcpu.prefault(GPA - 64 * PAGE_SIZE, PAGE_SIZE)
    expect_equal(error_name(result.error), "ENOENT", "result of the ioctl")
    expect_equal(fixture.vcpu.stat("pf_mmio_spte_created") - created, 1, "MMIO entries")
    fixture.vcpu.start_at(READ_32, rsi=GPA - 64 * PAGE_SIZE, rcx=1, rdx=PAGE_SIZE)
    expect_equal(fixture.vcpu.run(), abi.EXIT_MMIO, "exit reason of a read outside all slots")
    expect_equal(fixture.vcpu.mmio, (GPA - 64 * PAGE_SIZE, False), "MMIO access")
    expect_equal(
        fixture.vcpu.stat("pf_mmio_spte_created") - created,
        1,
        "MMIO entries after the read",
    )


@case(
    "errors/enoent-mmio-then-slot",
    "if a prefault has created an MMIO entry and a slot is then created at this address, a later "
    "prefault maps the slot",
    "x86.c:kvm_arch_memslots_updated() updates the MMIO generation",
    mapping=True,
)
def mmio_then_slot() -> None:
    fixture = make_fixture()
    at = GPA - 64 * PAGE_SIZE
    expect_equal(
        error_name(fixture.vcpu.prefault(at, PAGE_SIZE).error), "ENOENT", "result of the ioctl"
    )
    memory = small(16 * PAGE_SIZE)
    memory.write()
    fixture.vm.slot(2, at, memory)
    fixture.vcpu.prefault_all(at, memory.size)
    expect_reads(fixture.vcpu, memory, 0, gpa=at)


@case(
    "errors/enoent-apic-page",
    "the ioctl fails with ENOENT for the local APIC's page, unless the CPU virtualizes the APIC",
    "mmu/mmu.c:kvm_mmu_faultin_pfn(): APIC_ACCESS_PAGE_PRIVATE_MEMSLOT",
)
def apic_page() -> None:
    if not virtualizes_apic():
        _enoent(_APIC, irqchip=True)
        return
    # KVM has a private slot for this page only.
    fixture = make_fixture(vm=KvmVm(irqchip=True))
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(_APIC, 4 * PAGE_SIZE)
    expect_equal(str(result), f"success, {3 * PAGE_SIZE:#x} bytes left", "result of the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(1))
    _unharmed(fixture)


def _wrong_fd(which: str) -> None:
    fixture = make_fixture()
    fd = fixture.vm.fd if which == "vm" else kvm_fd()
    arguments = ffi.new("uint64_t[8]", [GPA, PAGE_SIZE])
    answer = lib.pf_vmm_ioctl(fd, abi.PRE_FAULT_MEMORY, int(ffi.cast("uintptr_t", arguments)))
    expect(
        error_name(-answer) in ("ENOTTY", "EINVAL"),
        f"result of the ioctl: got {error_name(-answer)}, expected ENOTTY or EINVAL",
    )
    expect_equal(list(arguments)[1], PAGE_SIZE, "size")
    _unharmed(fixture)


for which in ("vm", "kvm"):
    add(
        f"errors/not-a-vcpu-{which}",
        "the ioctl fails with ENOTTY or EINVAL on a VM descriptor or a /dev/kvm descriptor",
        "virt/kvm/kvm_main.c:kvm_vm_ioctl(), kvm_dev_ioctl()",
        lambda which=which: _wrong_fd(which),  # type: ignore[misc]
    )


@case(
    "errors/sigbus-poisoned-page",
    "if the range starts at a poisoned page, the calling thread gets SIGBUS, and the ioctl fails "
    "with EINTR",
    "mmu/mmu.c:kvm_handle_error_pfn(), kvm_send_hwpoison_signal(): KVM sends SIGBUS and retries, "
    "and the retry fails because a signal is pending",
    needs.capability,
    needs.root,
    destructive=True,
)
def poisoned_page() -> None:
    fixture = make_fixture()
    got: list[int] = []
    signal.signal(signal.SIGBUS, lambda number, _: got.append(number))
    try:
        fixture.memory.advise(HWPOISON, 4 * PAGE_SIZE, PAGE_SIZE)
    except OSError as error:
        raise Skip(f"MADV_HWPOISON failed: {error.strerror}") from None
    left = fixture.size - 4 * PAGE_SIZE
    result = fixture.vcpu.prefault(GPA, fixture.size)
    expect_equal(
        str(result),
        f"success, {left:#x} bytes left",
        "ioctl that starts before the poisoned page",
    )
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA, 4))
    expect_faults(taken, 0, 4, "faults taken by the guest before the poisoned page")
    got.clear()
    result = fixture.vcpu.prefault(GPA + 4 * PAGE_SIZE, left)
    expect_equal(
        str(result),
        f"EINTR, {left:#x} bytes left",
        "ioctl that starts at the poisoned page",
    )
    expect_equal(got, [signal.SIGBUS], "signals")
    fixture.vcpu.prefault_all(GPA + 5 * PAGE_SIZE, left - PAGE_SIZE)
    taken = fixture.vcpu.faults_of(lambda: fixture.vcpu.read(GPA + 5 * PAGE_SIZE, PAGES - 5))
    expect_faults(taken, 0, PAGES - 5, "faults taken by the guest after the poisoned page")


def _mmu_page_limit() -> str:
    """Prefault pages 2 MiB apart, so that each page needs its own page table."""
    count = 80
    memory = memfd(PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu()
    vcpu.warm()
    minimum = 64  # KVM_MIN_ALLOC_MMU_PAGES
    ioctl(vm.fd, abi.SET_NR_MMU_PAGES, minimum)
    done = 0
    for number in range(count):
        gpa = GPA + number * HUGE_PAGE_SIZE
        vm.slot(1 + number, gpa, memory)
        result = vcpu.prefault(gpa, PAGE_SIZE)
        if result.error:
            expect_equal(error_name(result.error), "ENOSPC", "errno of the failed ioctl")
            break
        done += 1
    vcpu.warm()
    seen = vcpu.read(GPA, done, stride=HUGE_PAGE_SIZE)
    expect_equal(
        seen,
        done * memory.word(0) & 0xFFFFFFFF,
        "sum of the words that the guest read",
    )
    return f"{done} of {count} page tables created with a limit of {minimum}"


add(
    "errors/enospc-mmu-pages",
    "the TDP MMU ignores the limit that KVM_SET_NR_MMU_PAGES sets, and the legacy MMU drops older "
    "tables or fails with ENOSPC",
    "mmu/mmu.c:make_mmu_pages_available()",
    _mmu_page_limit,
    needs.capability,
)
