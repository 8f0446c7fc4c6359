# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about private memory of protected VMs, and about mappable guest_memfd.

A protected VM has the KVM_X86_SW_PROTECTED_VM type.
"""

from __future__ import annotations

import errno
import struct

from ...host.kvm import Stage2Leaves
from ...units import HUGE_PAGE_SIZE, PAGE_SIZE
from .. import abi, needs
from ..expectations import error_name, expect, expect_equal, fails_with
from ..memory import Memory, small, system_call, thp
from ..suite import case
from ..vmm import KvmVm
from .common import GPA, PAGES, SLOT, Fixture, expect_mapped, expect_reads, expect_writes

_SIZE = PAGES * PAGE_SIZE
_GMEM = "mmu/mmu.c:kvm_mmu_faultin_pfn_private(), virt/kvm/guest_memfd.c:kvm_gmem_get_pfn()"


def _protected(memory: Memory | None = None, *, bind: bool = True) -> tuple[Fixture, int]:
    """Return a fixture with a protected VM, and the descriptor of a guest_memfd.

    :param bind: True to use the guest_memfd for the private memory of the slot.
    """
    vm = KvmVm(abi.VM_SW_PROTECTED)
    vcpu = vm.vcpu()
    memory = memory or small(_SIZE)
    memory.write()
    gmem = vm.guest_memfd(memory.size)
    if bind:
        vm.slot(SLOT, GPA, memory, flags=abi.MEM_GUEST_MEMFD, gmem=gmem)
    else:
        vm.slot(SLOT, GPA, memory)
    vcpu.warm()
    return Fixture(vm, vcpu, memory), gmem


@case(
    "private/shared-part",
    "in a protected VM, KVM maps shared memory from the host mapping, as in an ordinary VM",
    "mmu/mmu.c:kvm_mmu_faultin_pfn()",
    needs.software_protected,
    mapping=True,
)
def shared_part() -> None:
    fixture, _ = _protected()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, _SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    expect_reads(fixture.vcpu, fixture.memory, 0)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "private/private-part",
    "KVM maps private memory writable from guest_memfd, and not from the host mapping",
    _GMEM,
    needs.software_protected,
    mapping=True,
)
def private_part() -> None:
    fixture, _ = _protected()
    fixture.vm.set_private(GPA, _SIZE)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, _SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    words = fixture.memory.words()
    taken = fixture.vcpu.stat("pf_taken")
    expect_equal(fixture.vcpu.read(GPA, PAGES), 0, "sum of the words that the guest read")
    fixture.vcpu.write(GPA, PAGES, 5)
    expect_equal(
        fixture.vcpu.read(GPA, PAGES),
        5 * PAGES,
        "sum of the words that the guest read after its writes",
    )
    expect_equal(fixture.vcpu.stat("pf_taken") - taken, 0, "faults")
    expect_equal(fixture.memory.words(), words, "words in the host mapping")


@case(
    "private/4k-only",
    "KVM maps private memory with 4 KiB leaves, even if the memory is aligned to 2 MiB",
    "virt/kvm/guest_memfd.c:kvm_gmem_get_pfn(): max_order is 0",
    needs.software_protected,
    needs.transparent_huge_pages,
    mapping=True,
)
def four_kib_only() -> None:
    fixture, _ = _protected(thp(HUGE_PAGE_SIZE))
    fixture.vm.set_private(GPA, HUGE_PAGE_SIZE)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, HUGE_PAGE_SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(512))
    expect_equal(
        fixture.vcpu.faults_of(lambda: fixture.vcpu.write(GPA, 512, 1)),
        0,
        "faults caused by the guest's writes",
    )


@case(
    "private/mixed",
    "if private and shared pages alternate, one ioctl maps the private pages from guest_memfd and "
    "the shared pages from the host mapping",
    _GMEM,
    needs.software_protected,
    mapping=True,
)
def mixed() -> None:
    fixture, _ = _protected()
    for page in range(0, PAGES, 2):
        fixture.vm.set_private(GPA + page * PAGE_SIZE, PAGE_SIZE)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, _SIZE)
    expect_equal(str(result), "success, 0x0 bytes left", "result of the ioctl")
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    taken = fixture.vcpu.stat("pf_taken")
    wanted = sum(fixture.memory.words()[1::2]) & 0xFFFFFFFF
    expect_equal(fixture.vcpu.read(GPA, PAGES), wanted, "sum of the words that the guest read")
    expect_equal(fixture.vcpu.stat("pf_taken") - taken, 0, "faults")


@case(
    "private/made-shared",
    "if private memory is converted to shared memory, KVM unmaps this memory, and a later prefault "
    "maps the host's pages",
    "virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes() unmaps the range",
    needs.software_protected,
    mapping=True,
)
def made_shared() -> None:
    fixture, _ = _protected()
    fixture.vm.set_private(GPA, _SIZE)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, _SIZE)
    fixture.vm.set_private(GPA, _SIZE // 2, private=False)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES // 2))
    fixture.vcpu.prefault_all(GPA, _SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES))
    wanted = sum(fixture.memory.words()[: PAGES // 2]) & 0xFFFFFFFF
    taken = fixture.vcpu.stat("pf_taken")
    expect_equal(fixture.vcpu.read(GPA, PAGES), wanted, "sum of the words that the guest read")
    expect_equal(fixture.vcpu.stat("pf_taken") - taken, 0, "faults")


@case(
    "private/made-private",
    "if shared memory is converted to private memory, KVM unmaps this memory, and a later prefault "
    "maps guest_memfd pages",
    "virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes() unmaps the range",
    needs.software_protected,
    mapping=True,
)
def made_private() -> None:
    fixture, _ = _protected()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, _SIZE)
    fixture.vm.set_private(GPA, _SIZE)
    expect_mapped(fixture.vm, before, Stage2Leaves(0))
    fixture.vcpu.prefault_all(GPA, _SIZE)
    taken = fixture.vcpu.stat("pf_taken")
    expect_equal(fixture.vcpu.read(GPA, PAGES), 0, "sum of the words that the guest read")
    expect_equal(fixture.vcpu.stat("pf_taken") - taken, 0, "faults")


@case(
    "private/punched-hole",
    "if a hole is punched in guest_memfd, KVM unmaps the pages in the hole, and a later prefault "
    "maps zero-filled pages",
    "virt/kvm/guest_memfd.c:kvm_gmem_punch_hole()",
    needs.software_protected,
    mapping=True,
)
def punched_hole() -> None:
    fixture, gmem = _protected()
    fixture.vm.set_private(GPA, _SIZE)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, _SIZE)
    fixture.vcpu.write(GPA, PAGES, 3)
    system_call(285, gmem, 3, 0, 8 * PAGE_SIZE)  # fallocate: PUNCH_HOLE | KEEP_SIZE
    expect_mapped(fixture.vm, before, Stage2Leaves(PAGES - 8))
    fixture.vcpu.prefault_all(GPA, _SIZE)
    taken = fixture.vcpu.stat("pf_taken")
    expect_equal(
        fixture.vcpu.read(GPA, PAGES),
        3 * (PAGES - 8),
        "sum of the words that the guest read",
    )
    expect_equal(fixture.vcpu.stat("pf_taken") - taken, 0, "faults")


@case(
    "private/without-guest-memfd",
    "if private memory has no guest_memfd, the ioctl fails with EFAULT and sets "
    "KVM_EXIT_MEMORY_FAULT in kvm_run",
    "mmu/mmu.c:kvm_mmu_prepare_memory_fault_exit()",
    needs.software_protected,
)
def without_guest_memfd() -> None:
    fixture, _ = _protected(bind=False)
    fixture.vm.set_private(GPA, PAGE_SIZE)
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, PAGE_SIZE)
    expect_equal(str(result), "EFAULT, 0x1000 bytes left", "result of the ioctl")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    expect_equal(fixture.vcpu.exit_reason, abi.EXIT_MEMORY_FAULT, "exit reason in kvm_run")
    private = abi.MEMORY_ATTRIBUTE_PRIVATE
    expect_equal(
        fixture.vcpu.memory_fault,
        (private, GPA, PAGE_SIZE),
        "memory fault in kvm_run",
    )
    fixture.vm.set_private(GPA, PAGE_SIZE, private=False)
    fixture.vcpu.prefault_all(GPA, _SIZE)
    expect_reads(fixture.vcpu, fixture.memory, 0)


@case(
    "private/ordinary-vm",
    "an ordinary VM cannot have private memory",
    "virt/kvm/kvm_main.c:kvm_vm_ioctl_set_mem_attributes()",
)
def ordinary_vm() -> None:
    vm = KvmVm()
    vcpu = vm.vcpu()
    memory = small(_SIZE)
    memory.write()
    vm.slot(SLOT, GPA, memory)
    vcpu.warm()
    seen = fails_with(lambda: vm.set_private(GPA, PAGE_SIZE))
    expect(
        seen in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP),
        f"result of the ioctl: got {error_name(seen)}, expected EINVAL, ENOTTY or EOPNOTSUPP",
    )
    vcpu.prefault_all(GPA, _SIZE)
    expect_reads(vcpu, memory, 0)


@case(
    "private/mapped-guest-memfd",
    "if guest_memfd is mappable and initially shared, KVM maps it writable with 4 KiB leaves",
    "mmu/mmu.c:kvm_mmu_faultin_pfn_gmem() (v6.18) sets map_writable if the slot is not read-only",
    needs.mappable_guest_memfd,
    mapping=True,
)
def mapped_guest_memfd() -> None:
    vm = KvmVm()
    vcpu = vm.vcpu()
    gmem = vm.guest_memfd(_SIZE, abi.GMEM_MMAP | abi.GMEM_INIT_SHARED)
    memory = Memory(_SIZE, fd=gmem, shared=True)
    vm.slot(SLOT, GPA, memory, flags=abi.MEM_GUEST_MEMFD, gmem=gmem)
    vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(GPA, _SIZE)
    expect_mapped(vm, before, Stage2Leaves(PAGES))
    expect_writes(vcpu, memory, 0)
    memory.put(0, struct.pack("<I", 77))
    expect_equal(vcpu.read(GPA, 1), 77, "word that the guest read")
