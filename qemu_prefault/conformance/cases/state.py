# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that change the state of a vCPU between a prefault and KVM_RUN."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from ...units import PAGE_SIZE
from .. import abi
from ..device import ioctl
from ..expectations import expect_equal
from ..memory import small
from ..suite import add, case
from ..vmm import LONG64, KvmVcpu, KvmVm
from .common import GPA, PAGES, SLOT, Fixture, expect_reads, expect_writes, make_fixture

_ROLE = (
    "mmu/mmu.c:kvm_calc_tdp_mmu_root_page_role() does not depend on CR0, CR3, CR4 or EFER; a root "
    "stays allocated without users (tdp_mmu.c:kvm_tdp_mmu_alloc_root())"
)


def _paging(vcpu: KvmVcpu) -> None:
    vcpu.set_mode(LONG64)


def _reset(vcpu: KvmVcpu) -> None:
    """Set the vCPU's state as QEMU does when it resets the guest."""
    vcpu.set_mode(abi.RESET)
    vcpu.set_cpuid()
    vcpu.set_mode(abi.FLAT32)


def _cr0(vcpu: KvmVcpu) -> None:
    vcpu.set_mode(abi.CpuMode(abi.CODE_32, abi.DATA, cr0=abi.FLAT32.cr0 | abi.CR0_WP))
    vcpu.set_mode(abi.FLAT32)


def _cr4(vcpu: KvmVcpu) -> None:
    vcpu.set_mode(abi.CpuMode(abi.CODE_32, abi.DATA, cr0=abi.FLAT32.cr0, cr4=abi.CR4_PAE))


def _cr3(vcpu: KvmVcpu) -> None:
    vcpu.set_mode(abi.CpuMode(abi.CODE_32, abi.DATA, cr0=abi.FLAT32.cr0, cr3=0x5000))


def _pat(vcpu: KvmVcpu) -> None:
    vcpu.set_msr(0x277, 0x0007040600070406)


def _same(vcpu: KvmVcpu) -> None:
    vcpu.set_mode(vcpu.mode)


_CHANGES: tuple[tuple[str, str, Callable[[KvmVcpu], None]], ...] = (
    ("cpuid", "KVM_SET_CPUID2", KvmVcpu.set_cpuid),
    ("same-sregs", "KVM_SET_SREGS with the current values", _same),
    ("paging-on", "a change to 64-bit mode", _paging),
    ("reset", "a reset", _reset),
    ("cr0", "a change to CR0.WP", _cr0),
    ("cr4", "a change to CR4.PAE", _cr4),
    ("cr3", "a change to CR3 without paging", _cr3),
    ("msr", "a change to the PAT with KVM_SET_MSRS", _pat),
)


def _survives(change: Callable[[KvmVcpu], None], has_run: bool) -> None:
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu()
    vm.slot(SLOT, GPA, memory)
    if has_run:
        vcpu.warm()
    before = vm.leaves()
    vcpu.prefault_all(GPA, memory.size)
    expect_equal((vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    change(vcpu)
    expect_equal(
        (vm.leaves() - before).pages_4k,
        PAGES,
        "pages mapped after the change to the state",
    )
    vcpu.warm()
    expect_reads(vcpu, memory, 0)
    expect_writes(vcpu, memory, 0)


for name, what, change in _CHANGES:
    for has_run in (False, True):
        add(
            f"state/{name}{'-after-run' if has_run else ''}",
            f"KVM keeps the tables after {what} on a vCPU that has {'' if has_run else 'not '}run",
            _ROLE,
            lambda change=change, has_run=has_run: _survives(change, has_run),  # type: ignore[misc]
            mapping=True,
        )


def _across_modes(first: abi.CpuMode, then: abi.CpuMode) -> None:
    """Prefault on a vCPU in one CPU mode, and use the memory in another CPU mode."""
    fixture = make_fixture()
    helper = fixture.vm.vcpu(mode=first)
    before = fixture.vm.leaves()
    helper.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    user = fixture.vm.vcpu(mode=then)
    user.warm()
    expect_reads(user, fixture.memory, 0)
    expect_writes(user, fixture.memory, 0)


_MODES = {"real": abi.RESET, "protected": abi.FLAT32, "long": LONG64}
for first, first_mode in _MODES.items():
    for then in ("protected", "long"):
        add(
            f"state/{first}-then-{then}",
            f"pages that a prefault maps on a vCPU in {first} mode are also mapped for another "
            f"vCPU in {then} mode",
            _ROLE,
            lambda first=first_mode, then=_MODES[then]: _across_modes(first, then),  # type: ignore[misc]
            mapping=True,
        )


@case(
    "state/init",
    "KVM keeps the tables when a vCPU receives an INIT, which firmware sends to application "
    "processors",
    "x86.c:kvm_vcpu_reset()",
    mapping=True,
)
def init() -> None:
    fixture = make_fixture(vm=KvmVm(irqchip=True))
    fixture.vcpu.prefault_all(GPA, fixture.size)
    before = fixture.vm.leaves()
    ioctl(fixture.vcpu.fd, abi.SET_MP_STATE, struct.pack("<I", 2))  # KVM_MP_STATE_INIT_RECEIVED
    ioctl(fixture.vcpu.fd, abi.SET_MP_STATE, struct.pack("<I", abi.MP_RUNNABLE))
    fixture.vcpu.set_mode(abi.FLAT32)
    expect_equal(fixture.vm.leaves(), before, "leaves")
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "state/vcpu-closed",
    "KVM keeps the tables after the descriptor of the vCPU that filled them is closed",
    _ROLE,
    mapping=True,
)
def vcpu_closed() -> None:
    fixture = make_fixture()
    other = fixture.vm.vcpu()
    before = fixture.vm.leaves()
    other.prefault_all(GPA, fixture.size)
    other.kvm_run.close()
    os.close(other.stats.fd)
    os.close(other.fd)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)


def _repeatedly(fixture: Fixture) -> None:
    for _ in range(8):
        _reset(fixture.vcpu)
        fixture.vcpu.prefault_all(GPA, PAGE_SIZE)


@case(
    "state/many-resets",
    "repeated resets and prefaults add no leaves, because KVM finds the same root each time",
    _ROLE,
    mapping=True,
)
def many_resets() -> None:
    fixture = make_fixture()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    before = fixture.vm.leaves()
    _repeatedly(fixture)
    expect_equal(fixture.vm.leaves(), before, "leaves")
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)
