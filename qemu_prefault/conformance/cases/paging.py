# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases about the capability, shadow paging, and host faults on populated memory."""

from __future__ import annotations

import errno
import resource

from ...host.kvm import KVM_CAP_PRE_FAULT_MEMORY
from ...units import PAGE_SIZE
from .. import abi, guest_code, needs
from ..device import offers_prefault
from ..expectations import error_name, expect, expect_equal
from ..memory import small
from ..suite import add, case
from ..threads import RunningVcpu
from ..vmm import COUNTER, LONG64, KvmVm
from .common import GPA, PAGES, SLOT, expect_reads, expect_writes, make_fixture

_ONLY_TDP = "mmu/mmu.c:kvm_tdp_map_page(): page_fault must be kvm_tdp_page_fault()"
_CAPABILITY = "x86.c:kvm_vm_ioctl_check_extension() returns tdp_enabled"


@case(
    "paging/capability",
    "/dev/kvm and a VM report the same value for KVM_CAP_PRE_FAULT_MEMORY, and the ioctl succeeds "
    "only if the value is not 0",
    _CAPABILITY,
)
def capability() -> None:
    fixture = make_fixture()
    offered = offers_prefault()
    expect_equal(fixture.vm.check(KVM_CAP_PRE_FAULT_MEMORY) > 0, offered, "capability of the VM")
    answer = fixture.vcpu.prefault(GPA, fixture.size, any_error=True)
    expect_equal(
        answer.error == 0, offered, "whether the ioctl succeeds (must match the capability)"
    )
    expect_reads(fixture.vcpu, fixture.memory, 0 if offered else None)


@case(
    "paging/capability-protected-vm",
    "/dev/kvm and a protected VM report the same value for KVM_CAP_PRE_FAULT_MEMORY",
    _CAPABILITY,
    needs.software_protected,
)
def capability_protected_vm() -> None:
    fixture = make_fixture(vm=KvmVm(abi.VM_SW_PROTECTED))
    seen = fixture.vm.check(KVM_CAP_PRE_FAULT_MEMORY) > 0
    expect_equal(seen, offers_prefault(), "capability of the VM")
    expect_reads(fixture.vcpu, fixture.memory, None)


def _shadow_refusal(mode: abi.CpuMode, has_run: bool) -> None:
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu(mode=mode)
    vm.slot(SLOT, GPA, memory)
    if has_run:
        vcpu.warm()
    before = vm.leaves()
    for _ in range(100):
        result = vcpu.prefault(GPA, memory.size, any_error=True)
        expect_equal(error_name(result.error), "EOPNOTSUPP", "result of the ioctl")
        expect_equal(result.left, memory.size, "bytes left")
    expect_equal(vm.leaves(), before, "leaves")
    user = vm.vcpu(mode=LONG64 if mode == abi.RESET else mode)
    user.warm()
    expect_reads(user, memory, None)
    expect_writes(user, memory, None)
    expect_writes(user, memory, 0)


for name, mode in (("real", abi.RESET), ("protected", abi.FLAT32), ("long", LONG64)):
    for has_run in (False, True):
        if has_run and mode == abi.RESET:
            continue
        add(
            f"paging/shadow-{name}-mode{'-after-run' if has_run else ''}",
            f"if KVM uses shadow paging, the ioctl fails with EOPNOTSUPP on a vCPU in {name} mode, "
            "and 100 attempts map no page",
            _ONLY_TDP,
            lambda mode=mode, has_run=has_run: _shadow_refusal(mode, has_run),  # type: ignore[misc]
            needs.shadow_paging,
            needs.known_ioctl,
        )


def _live_guest(mode: abi.CpuMode) -> None:
    """Prefault on one vCPU while another vCPU increments words in the memory."""
    fixture = make_fixture()
    runner = fixture.vm.vcpu(mode=mode)
    runner.warm()
    start = fixture.memory.words()
    registers = {"rbp": GPA, "rdi": PAGES, "rdx": PAGE_SIZE, "rax": 1, "rbx": COUNTER}
    with RunningVcpu(runner, guest_code.ROUNDS, **registers) as running:
        running.wait_progress()
        for _ in range(100):
            answer = fixture.vcpu.prefault(GPA, fixture.size, any_error=True)
            offered = offers_prefault()
            expect_equal(
                answer.error == 0, offered, "whether the ioctl succeeds (must match the capability)"
            )
        running.wait_progress(10)
    rounds = fixture.vm.counter
    grown = {now - then for now, then in zip(fixture.memory.words(), start, strict=True)}
    expect(
        grown <= {rounds, rounds + 1},
        f"the guest counted {rounds} passes, but the words have increased by {grown}",
    )


for name, mode in (("protected", abi.FLAT32), ("long", LONG64)):
    add(
        f"paging/live-guest-{name}-mode",
        f"a running guest in {name} mode loses no writes during 100 prefaults, even if all "
        "prefaults fail",
        _ONLY_TDP,
        lambda mode=mode: _live_guest(mode),  # type: ignore[misc]
    )


def _host_faults(populate: bool, mode: abi.CpuMode) -> None:
    """Check how many minor host faults the guest's first writes take."""
    memory = small(PAGES * PAGE_SIZE)
    vm = KvmVm()
    vcpu = vm.vcpu(mode=mode)
    vm.slot(SLOT, GPA, memory)
    vcpu.warm()
    memory_words = [0x51] * PAGES
    if populate:
        memory.populate()
    vcpu.write(COUNTER, 1, 0)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    vcpu.write(GPA, PAGES, 0x51)
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    if populate:
        expect(
            faults < PAGES / 2,
            f"the guest's writes took {faults} host faults on populated memory, expected fewer "
            f"than {PAGES / 2:g}",
        )
    else:
        expect(
            faults >= PAGES,
            f"the guest's writes took {faults} host faults, expected at least {PAGES}",
        )
    expect_equal(memory.words(), memory_words, "words in the memory after the guest's writes")


for populate in (False, True):
    for name, mode in (("protected", abi.FLAT32), ("long", LONG64)):
        add(
            f"paging/host-faults-{'populated' if populate else 'untouched'}-{name}-mode",
            "on populated memory, the guest's first writes take no host faults in any paging mode"
            if populate
            else "on untouched memory, the guest's first writes take one host fault per page",
            "virt/kvm/kvm_main.c:hva_to_pfn_slow(), mm/memory.c:mm_account_fault()",
            lambda populate=populate, mode=mode: _host_faults(populate, mode),  # type: ignore[misc]
        )


@case(
    "paging/unknown-ioctl",
    "a kernel without the ioctl returns EINVAL and does not change struct kvm_pre_fault_memory",
    "x86.c:kvm_arch_vcpu_ioctl()",
    lambda host: "" if host.refusal == errno.EINVAL else "this kernel has the ioctl",
)
def unknown_ioctl() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, fixture.size, any_error=True)
    expect_equal(error_name(result.error), "EINVAL", "result of the ioctl")
    expect_equal(result.left, fixture.size, "size")
    expect_equal(fixture.vm.leaves(), before, "leaves")
    expect_reads(fixture.vcpu, fixture.memory, None)
