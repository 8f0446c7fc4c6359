# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about a prefault vCPU, which is created only for prefaulting and never runs.

The plugin relies on these cases (docs/design/plugin.md).
"""

from __future__ import annotations

import errno

from ...units import PAGE_SIZE
from .. import abi, guest_code, needs
from ..device import HANG_SECONDS, ioctl
from ..expectations import expect, expect_equal, fails_with
from ..features import has_ad_bits
from ..memory import small
from ..suite import KnownBad, Skip, case
from ..threads import RunningVcpu
from ..vmm import COUNTER, KvmVcpu, KvmVm
from .common import (
    GPA,
    OTHER_GPA,
    OTHER_SLOT,
    PAGES,
    SLOT,
    expect_writes,
    make_fixture,
)
from .dirty import DirtyRing

_ROOT = "mmu/tdp_mmu.c:kvm_tdp_mmu_alloc_root() shares a root between vCPUs with the same role"
MSR_TSC, MSR_APIC_BASE, MSR_VP_INDEX = 0x10, 0x1B, 0x40000002
#: The address of the local APIC in its base MSR, and the bit that enables the APIC.
APIC_DISABLED, APIC_ENABLE = 0xFEE00000, 1 << 11
#: A value that differs from the TSC by so much that KVM starts a new TSC generation.
OTHER_TSC = 1 << 48


def _prefault_vcpu(vm: KvmVm) -> KvmVcpu:
    vcpu = vm.vcpu()
    vcpu.set_msr(MSR_APIC_BASE, APIC_DISABLED)
    return vcpu


@case(
    "vcpu/never-run-beside-one-that-runs",
    "a prefault on a vCPU that has never run, and whose local APIC is disabled, maps pages for a "
    "vCPU that is in KVM_RUN meanwhile",
    _ROOT,
    mapping=True,
)
def beside_one_that_runs() -> None:
    fixture = make_fixture()
    other = _prefault_vcpu(fixture.vm)
    with RunningVcpu(fixture.vcpu, guest_code.COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        other.prefault_all(GPA, fixture.size)
        running.wait_progress()
    fixture.vcpu.kick(False)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/never-run-in-smm",
    "a prefault on a vCPU in system management mode that has never run maps pages for a vCPU that "
    "enters this mode later",
    "mmu/mmu.c:kvm_calc_cpu_role(): role.smm; " + _ROOT,
    needs.smm,
    mapping=True,
)
def in_smm() -> None:
    fixture = make_fixture()
    fixture.vm.slot(abi.SMM_SPACE, 0, fixture.vm.system)
    fixture.vm.slot(abi.SMM_SPACE | SLOT, GPA, fixture.memory)
    other = _prefault_vcpu(fixture.vm)
    other.set_smm(True)
    other.prefault_all(GPA, fixture.size)
    fixture.vcpu.set_smm(True)
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/never-run-gets-a-new-root",
    "if KVM has dropped the root of a vCPU that has never run, KVM_SET_CPUID2 gives the vCPU a new "
    "root",
    "cpuid.c:kvm_vcpu_after_set_cpuid(), mmu/mmu.c:kvm_mmu_after_set_cpuid(); since 20a6cff3b283 "
    "(v6.15), the ioctl itself requests a new root",
    mapping=True,
)
def gets_a_new_root() -> None:
    fixture = make_fixture()
    other = _prefault_vcpu(fixture.vm)
    other.prefault_all(GPA, fixture.size)
    fixture.vm.slot(OTHER_SLOT, OTHER_GPA, small(PAGE_SIZE))
    fixture.vm.delete(OTHER_SLOT)
    fixture.vcpu.warm()
    hung = other.prefault(GPA, fixture.size, limit=HANG_SECONDS).seconds >= HANG_SECONDS
    other.set_cpuid()
    other.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)
    if hung:
        raise KnownBad("the ioctl on the dropped root ended only when a signal arrived")


@case(
    "vcpu/never-run-has-its-own-ring",
    "a prefault on a vCPU that has never run adds its pages to the dirty ring of this vCPU, and "
    "KVM does not log the guest's later writes to these pages in the ring of the vCPU that writes",
    "virt/kvm/kvm_main.c:mark_page_dirty_in_slot(); mmu/spte.c:make_spte()",
    needs.dirty_ring,
    mapping=True,
)
def has_its_own_ring() -> str | None:
    vm = KvmVm(dirty_ring=16 * PAGE_SIZE)
    fixture = make_fixture(vm=vm, flags=abi.MEM_LOG_DIRTY_PAGES)
    other = _prefault_vcpu(vm)
    rings = DirtyRing(fixture.vcpu), DirtyRing(other)
    list(rings[0].take())
    ioctl(vm.fd, abi.RESET_DIRTY_RINGS)
    other.prefault_all(GPA, fixture.size)
    marked = PAGES if has_ad_bits() else 0
    of_slot = [sum(slot == SLOT for slot, _ in ring.take()) for ring in rings]
    expect_equal(of_slot, [0, marked], "pages in the rings after the prefault")
    expect_writes(fixture.vcpu, fixture.memory, 0 if marked else PAGES)
    of_slot = [sum(slot == SLOT for slot, _ in ring.take()) for ring in rings]
    expect_equal(of_slot, [PAGES - marked, 0], "pages in the rings after the guest's writes")
    return None if marked else "without A/D bits, KVM logs the guest's writes"


@case(
    "vcpu/never-run-can-stop-the-master-clock",
    "if the TSC of a vCPU is set, KVM uses the master clock only if the TSC of each vCPU that has "
    "never run is set to the same value",
    "x86.c:pvclock_update_vm_gtod_copy() compares nr_vcpus_matched_tsc with online_vcpus",
)
def can_stop_the_master_clock() -> None:
    vm = KvmVm()
    vcpu = vm.vcpu()
    other = _prefault_vcpu(vm)
    vcpu.warm()
    if not vm.has_master_clock():
        raise Skip("this KVM uses no master clock")
    for each in (vcpu, other):
        each.set_msr(MSR_TSC, OTHER_TSC)
    vcpu.warm()
    expect(vm.has_master_clock(), "the VM does not use the master clock although the TSCs match")
    vcpu.set_msr(MSR_TSC, 2 * OTHER_TSC)
    vcpu.warm()
    expect(not vm.has_master_clock(), "the VM uses the master clock although the TSCs differ")


@case(
    "vcpu/never-run-gets-no-interrupts",
    "a vCPU whose local APIC is disabled in the APIC base MSR receives no interrupts",
    "lapic.c:kvm_recalculate_apic_map() skips vCPUs for which kvm_apic_present() is false",
)
def gets_no_interrupts() -> None:
    vm = KvmVm(irqchip=True)
    vm.vcpu()
    other = _prefault_vcpu(vm)
    expect_equal(vm.signal_init(other.number), 0, "vCPUs that received the INIT")
    other.set_msr(MSR_APIC_BASE, APIC_DISABLED | APIC_ENABLE)
    expect_equal(vm.signal_init(other.number), 1, "vCPUs that received the INIT with an APIC")


@case(
    "vcpu/never-run-has-a-vp-index",
    "the Hyper-V index of a vCPU is at first the number of vCPUs that existed before, and can be "
    "set to KVM_CAP_MAX_VCPUS - 1",
    "hyperv.c:kvm_hv_vcpu_init(), kvm_hv_set_msr(): HV_X64_MSR_VP_INDEX, KVM_MAX_VCPUS",
)
def has_a_vp_index() -> None:
    vm = KvmVm()
    vm.vcpu()
    other = _prefault_vcpu(vm)
    try:
        index = other.get_msr(MSR_VP_INDEX)
    except OSError:
        raise Skip("this KVM does not emulate Hyper-V") from None
    expect_equal(index, 1, "index of the second vCPU")
    most = vm.check(abi.CAP_MAX_VCPUS) - 1
    other.set_msr(MSR_VP_INDEX, most)
    expect_equal(other.get_msr(MSR_VP_INDEX), most, "index after it was set")


@case(
    "vcpu/never-run-needs-an-id",
    "the limit of vCPU ids can be set once, and KVM refuses larger ids and ids that exist",
    "x86.c:kvm_vm_ioctl_enable_cap(): KVM_CAP_MAX_VCPU_ID; kvm_arch_vcpu_precreate()",
)
def needs_an_id() -> None:
    vm = KvmVm()
    vm.enable(abi.CAP_MAX_VCPU_ID, 2)
    again = fails_with(lambda: vm.enable(abi.CAP_MAX_VCPU_ID, 3))
    expect_equal(again, errno.EINVAL, "errno of a second limit")
    vm.vcpu()
    vm.vcpu()
    refused = fails_with(lambda: ioctl(vm.fd, abi.CREATE_VCPU, 2))
    expect_equal(refused, errno.EINVAL, "errno of an id at the limit")
    refused = fails_with(lambda: ioctl(vm.fd, abi.CREATE_VCPU, 1))
    expect_equal(refused, errno.EEXIST, "errno of an id that exists")
