# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a nested guest on a vCPU.

The nested guest has the system memory's page tables and runs 64-bit code. On AMD, the vCPU executes
``vmrun``. On Intel, KVM_SET_NESTED_STATE loads the state of a vCPU that runs a nested guest, so
that no VMX code is needed in the guest (Documentation/virt/kvm/api.rst, KVM_SET_NESTED_STATE).
"""

from __future__ import annotations

import struct

from ..host.kvm import parameter
from ..units import GIB, PAGE_SIZE
from . import abi, guest_code
from .expectations import expect_equal
from .vmm import COUNTER, LONG64, TABLES, KvmVcpu, KvmVm

# Addresses in the system memory. The tables of nested paging have 3 pages.
_VMCB, _HOST_SAVE, _VMXON, _VMCS, _NESTED_TABLES = 0x8000, 0x9000, 0x8000, 0x9000, 0xA000


def _on_intel() -> bool:
    return parameter("kvm_intel", "nested") is not None


def create_vcpu(vm: KvmVm) -> KvmVcpu:
    """Create a vCPU that can run a nested guest, and make it read all system memory."""
    vcpu = vm.vcpu(mode=LONG64 if _on_intel() else LONG64.with_efer(abi.EFER_SVME))
    vcpu.warm()
    return vcpu


def enter(vcpu: KvmVcpu, *, nested_paging: bool) -> None:
    """Run a nested guest until its first exit to the VMM, which leaves the vCPU in guest mode.

    :param vcpu: A vCPU from :func:`create_vcpu`.
    :param nested_paging: Whether the nested guest uses nested paging (NPT or EPT). If not, KVM uses
        shadow paging for the nested guest.
    :raises Unexpected: If the vCPU does not run :data:`.guest_code.COUNT_AND_OUT` once.
    """
    (_enter_vmx if _on_intel() else _enter_svm)(vcpu, nested_paging)
    expect_equal(vcpu.run(), abi.EXIT_IO, "exit reason of the nested guest")
    expect_equal(vcpu.stat("guest_mode"), 1, "guest_mode")
    expect_equal(vcpu.vm.counter, 1, "counter of the nested guest")


def run_again(vcpu: KvmVcpu) -> None:
    """Check that the nested guest still runs and increments its counter."""
    before = vcpu.vm.counter
    vcpu.start_at(guest_code.COUNT_AND_OUT, rbx=COUNTER)
    expect_equal(vcpu.run(), abi.EXIT_IO, "exit reason of the nested guest")
    expect_equal(vcpu.vm.counter, before + 1, "counter of the nested guest")
    expect_equal(vcpu.stat("guest_mode"), 1, "guest_mode")


_VM_HSAVE_PA = 0xC0010117


def _enter_svm(vcpu: KvmVcpu, nested_paging: bool) -> None:
    vm = vcpu.vm
    rip = vm.program(guest_code.COUNT_AND_OUT)
    vm.system.put(_VMCB, _vmcb(rip=rip, cr3=TABLES, nested_cr3=TABLES if nested_paging else None))
    vcpu.set_msr(_VM_HSAVE_PA, _HOST_SAVE)
    vcpu.start_at(guest_code.VMRUN, rax=_VMCB, rbx=COUNTER)


_INTERCEPT_VMRUN = 1 << 0


def _vmcb(*, rip: int, cr3: int, nested_cr3: int | None) -> bytes:
    """Return a VMCB (AMD APM volume 2, appendix B) for 64-bit code at ``rip``.

    :param rip: The guest address of the first instruction.
    :param cr3: The guest address of the page tables.
    :param nested_cr3: The guest address of the nested page tables, or None to disable nested
        paging.
    """
    page = bytearray(PAGE_SIZE)
    struct.pack_into("<I", page, 0x010, _INTERCEPT_VMRUN)
    struct.pack_into("<I", page, 0x058, 1)  # ASID
    if nested_cr3 is not None:
        struct.pack_into("<Q", page, 0x090, 1)
        struct.pack_into("<Q", page, 0x0B0, nested_cr3)
    data, code = (0x10, 0xC93, 0xFFFFFFFF), (0x8, 0xA9B, 0xFFFFFFFF)
    segments = [data, code, *[data] * 4]
    for number, (selector, attributes, limit) in enumerate(segments):  # es cs ss ds fs gs
        struct.pack_into("<HHIQ", page, 0x400 + 16 * number, selector, attributes, limit, 0)
    struct.pack_into("<Q", page, 0x4D0, 1 << 12 | 1 << 10 | 1 << 8)  # EFER
    struct.pack_into("<Q", page, 0x548, 1 << 5)  # CR4
    struct.pack_into("<Q", page, 0x550, cr3)
    struct.pack_into("<Q", page, 0x558, 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1)  # CR0
    struct.pack_into("<Q", page, 0x560, 0x400)  # DR7
    struct.pack_into("<Q", page, 0x568, 0xFFFF0FF0)  # DR6
    struct.pack_into("<Q", page, 0x570, 2)  # RFLAGS
    struct.pack_into("<Q", page, 0x578, rip)
    return bytes(page)


# The MSRs with the VMX capabilities (Intel SDM volume 3, appendix A). The low half of the TRUE_*
# MSRs contains the controls that must be 1.
_VMX_BASIC, _PINBASED, _PROCBASED, _EXIT, _ENTRY = 0x480, 0x48D, 0x48E, 0x48F, 0x490
_SECONDARY_CONTROLS, _ENABLE_EPT, _LONG_MODE_HOST, _LONG_MODE_GUEST = 1 << 31, 2, 1 << 9, 1 << 9
_EPT_WALK_OF_4_WRITE_BACK = 3 << 3 | 6
_CR4_VMXE = 1 << 13
_NO_ADDRESS = (1 << 64) - 1
_GUEST_MODE = 1  # KVM_STATE_NESTED_GUEST_MODE


def _enter_vmx(vcpu: KvmVcpu, nested_paging: bool) -> None:
    vm = vcpu.vm
    vm.system.put(_NESTED_TABLES, guest_code.identity_ept(_NESTED_TABLES, 1024 * GIB))
    vmcs = _vmcs12(vcpu, rip=vm.program(guest_code.COUNT_AND_OUT), nested_paging=nested_paging)
    # struct kvm_nested_state: flags, format (VMX), size, vmxon_pa, vmcs12_pa, padding; the data are
    # the VMCS and the shadow VMCS.
    size = 128 + 2 * PAGE_SIZE
    header = struct.pack("<HHIQQ104x", _GUEST_MODE, 0, size, _VMXON, _VMCS)
    vcpu.set_nested_state(header + vmcs + bytes(PAGE_SIZE))
    vcpu.start_at(guest_code.COUNT_AND_OUT, rbx=COUNTER)


def _vmcs12(vcpu: KvmVcpu, *, rip: int, nested_paging: bool) -> bytes:
    """Return a ``struct vmcs12`` (arch/x86/kvm/vmx/vmcs12.h) for 64-bit code at ``rip``.

    The kernel promises not to change the structure's offsets, as a migration depends on them.
    """
    page = bytearray(PAGE_SIZE)

    def put(layout: str, offset: int, *values: int) -> None:
        struct.pack_into(f"<{layout}", page, offset, *values)

    def required(msr: int) -> int:
        return vcpu.get_msr(msr) & 0xFFFFFFFF

    put("I", 0, vcpu.get_msr(_VMX_BASIC) & 0x7FFFFFFF)  # revision
    put("Q", 176, _NO_ADDRESS)  # VMCS link pointer
    put("I", 744, required(_PINBASED))
    put("I", 748, required(_PROCBASED) | (_SECONDARY_CONTROLS if nested_paging else 0))
    put("I", 768, required(_EXIT) | _LONG_MODE_HOST)
    put("I", 780, required(_ENTRY) | _LONG_MODE_GUEST)
    if nested_paging:
        put("I", 804, _ENABLE_EPT)
        put("Q", 120, _NESTED_TABLES | _EPT_WALK_OF_4_WRITE_BACK)
    mode = vcpu.mode
    for at in (424, 584):  # CR0, CR3 and CR4 of the nested guest and of its hypervisor
        put("3Q", at, mode.cr0, mode.cr3, mode.cr4 | _CR4_VMXE)
    put("Q", 528, 0x400)  # DR7
    put("2Q", 544, rip, 2)  # RIP and RFLAGS
    put("Q", 672, rip)  # the hypervisor's RIP, which it never reaches
    # Limits, access rights and selectors of es, cs, ss, ds, fs, gs, ldtr and tr. LDTR is unusable.
    put("8I", 840, *[0xFFFFFFFF] * 6, 0, 0xFFFF)
    data, code, unusable, busy_task = 0xC093, 0xA09B, 1 << 16, 0x8B
    put("8I", 880, data, code, *[data] * 4, unusable, busy_task)
    put("8H", 964, 0x10, 0x8, *[0x10] * 4, 0, 0x18)
    put("7H", 982, 0x10, 0x8, *[0x10] * 4, 0x18)  # the hypervisor's es, cs, ss, ds, fs, gs and tr
    return bytes(page)
