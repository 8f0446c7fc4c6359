# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that prefault on a vCPU that has never run, is idle, runs, or is halted."""

from __future__ import annotations

import os
import signal
from struct import pack

from ...units import PAGE_SIZE
from .. import abi, guest_code, needs
from ..device import ioctl
from ..expectations import expect, expect_equal
from ..host_facts import read_host_facts
from ..memory import small
from ..suite import add, case
from ..threads import BackgroundCall, RunningVcpu
from ..vmm import COUNTER, KvmVcpu, KvmVm
from .common import (
    GPA,
    PAGES,
    SLOT,
    Fixture,
    expect_faults,
    expect_reads,
    expect_writes,
    make_fixture,
)

_MUTEX = "virt/kvm/kvm_main.c:kvm_vcpu_ioctl(): vcpu->mutex, mutex_lock_killable()"
_ROOT = "mmu/tdp_mmu.c:kvm_tdp_mmu_alloc_root() shares a root between vCPUs with the same role"


def _fresh(*, cpuid: bool = True, mode: abi.CpuMode = abi.FLAT32) -> Fixture:
    """Return a fixture whose vCPU has never run."""
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = KvmVm()
    vcpu = vm.vcpu(cpuid=cpuid, mode=mode)
    vm.slot(SLOT, GPA, memory)
    return Fixture(vm, vcpu, memory)


@case("vcpu/never-run", "the ioctl succeeds on a vCPU that has never run", _ROOT, mapping=True)
def never_run() -> None:
    fixture = _fresh()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/just-created",
    "the ioctl succeeds on a new vCPU whose CPUID and registers are not set yet",
    "x86.c:kvm_arch_vcpu_create()",
    mapping=True,
)
def just_created() -> None:
    fixture = _fresh(cpuid=False, mode=abi.RESET)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    fixture.vcpu.set_cpuid()
    fixture.vcpu.set_mode(abi.FLAT32)
    fixture.vcpu.warm()
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/run-and-idle",
    "the ioctl succeeds on a vCPU that has run and is outside KVM_RUN",
    _ROOT,
    mapping=True,
)
def run_and_idle() -> None:
    fixture = make_fixture()
    fixture.vcpu.write(GPA, 4, 0x77)
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0, first=PAGES - 4)


@case(
    "vcpu/never-run-for-a-later-one",
    "pages that a prefault maps on a vCPU that has never run are also mapped for a vCPU that is "
    "created later",
    _ROOT,
    mapping=True,
)
def for_a_later_one() -> None:
    fixture = _fresh()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    later = fixture.vm.vcpu()
    later.warm()
    expect_writes(later, fixture.memory, 0)


@case(
    "vcpu/never-run-for-one-that-runs",
    "pages that a prefault maps on a vCPU that has never run are also mapped for a vCPU that has "
    "run before",
    _ROOT,
    mapping=True,
)
def for_one_that_runs() -> None:
    fixture = make_fixture()
    other = fixture.vm.vcpu()
    other.prefault_all(GPA, fixture.size)
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/running-blocks",
    "on a vCPU in KVM_RUN, the ioctl waits until KVM_RUN returns, and signals do not end the wait",
    _MUTEX,
    needs.known_ioctl,
)
def running_blocks() -> None:
    fixture = make_fixture()
    with RunningVcpu(fixture.vcpu, guest_code.COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        # Block signals, because the case checks the wait for the mutex, not the ioctl after it.
        task = BackgroundCall(lambda: _without_signals(fixture.vcpu, fixture.size))
        task.wait_state("D")
        for _ in range(5):
            task.interrupt()
            running.wait_progress()
            expect(task.is_alive(), "a signal ended the wait for the vCPU")
    answer = task.result()
    expect(_or_refused(answer), f"the ioctl failed with errno {answer} after KVM_RUN returned")
    fixture.vcpu.kick(False)
    expect_reads(fixture.vcpu, fixture.memory, None if answer else 0)


def _without_signals(vcpu: KvmVcpu, size: int) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return vcpu.prefault(GPA, size, any_error=True).error


def _or_refused(answer: int) -> bool:
    return answer in (0, read_host_facts().refusal)


@case(
    "vcpu/running-killed",
    "SIGKILL ends the wait for a vCPU in KVM_RUN, and the process ends immediately",
    _MUTEX,
    needs.known_ioctl,
)
def running_killed() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fixture = make_fixture()
            with RunningVcpu(fixture.vcpu, guest_code.COUNT, rbx=COUNTER) as running:
                running.wait_progress()
                BackgroundCall(lambda: fixture.vcpu.prefault(GPA, PAGE_SIZE)).wait_state("D")
                os.write(writer, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    expect_equal(os.read(reader, 1), b"!", "report of the child that the ioctl waits")
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    expect_equal(status, -signal.SIGKILL, "exit status of the child")


@case(
    "vcpu/halted-blocks",
    "on a vCPU that is halted inside KVM_RUN, the ioctl also waits until KVM_RUN returns",
    _MUTEX + "; x86.c:vcpu_block() waits inside KVM_RUN",
    needs.known_ioctl,
)
def halted_blocks() -> None:
    fixture = make_fixture(vm=KvmVm(irqchip=True))
    halts = fixture.vcpu.stat("halt_exits")
    running = RunningVcpu(fixture.vcpu, guest_code.HALT)
    running.task.wait_state("S")
    task = BackgroundCall(lambda: _without_signals(fixture.vcpu, fixture.size))
    task.wait_state("D")
    expect(task.is_alive(), "the ioctl returned before KVM_RUN returned")
    expect_equal(running.stop(), abi.EXIT_INTR, "exit reason of the halted vCPU")
    answer = task.result()
    expect(_or_refused(answer), f"the ioctl failed with errno {answer} after KVM_RUN returned")
    expect(fixture.vcpu.stat("halt_exits") > halts, "the vCPU did not halt")
    reader = fixture.vm.vcpu()
    reader.warm()
    expect_reads(reader, fixture.memory, None if answer else 0)


@case(
    "vcpu/halted-and-out",
    "the ioctl succeeds on a halted vCPU outside KVM_RUN",
    _ROOT,
    mapping=True,
)
def halted_and_out() -> None:
    fixture = make_fixture(vm=KvmVm(irqchip=True))
    running = RunningVcpu(fixture.vcpu, guest_code.HALT)
    running.task.wait_state("S")
    running.stop()
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    reader = fixture.vm.vcpu()
    expect_reads(reader, fixture.memory, None)
    expect_writes(reader, fixture.memory, 0)


@case(
    "vcpu/waiting-for-sipi",
    "the ioctl succeeds on a vCPU that waits for its start-up interrupt (SIPI)",
    _ROOT,
    mapping=True,
)
def waiting_for_sipi() -> None:
    fixture = make_fixture(vm=KvmVm(irqchip=True))
    second = fixture.vm.vcpu()
    ioctl(second.fd, abi.SET_MP_STATE, pack("<I", 1))  # KVM_MP_STATE_UNINITIALIZED
    before = fixture.vm.leaves()
    second.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_writes(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/immediate-exit",
    "the ioctl succeeds on a vCPU while immediate_exit is set",
    "x86.c:kvm_arch_vcpu_ioctl_run() checks immediate_exit, but the ioctl does not",
    mapping=True,
)
def immediate_exit() -> None:
    fixture = make_fixture()
    fixture.vcpu.kick()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    fixture.vcpu.kick(False)
    expect_reads(fixture.vcpu, fixture.memory, 0)


@case(
    "vcpu/another-runs",
    "the ioctl succeeds on a vCPU outside KVM_RUN while another vCPU runs, and does not interrupt "
    "the other vCPU",
    "mmu/mmu.c:kvm_tdp_mmu_page_fault() takes mmu_lock for reading",
    mapping=True,
)
def another_runs() -> None:
    fixture = make_fixture()
    runner = fixture.vm.vcpu()
    runner.warm()
    with RunningVcpu(runner, guest_code.COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        before = fixture.vm.leaves()
        fixture.vcpu.prefault_all(GPA, fixture.size)
        expect_equal((fixture.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
        running.wait_progress()
    expect_writes(fixture.vcpu, fixture.memory, 0)


def _between_runs(times: int) -> None:
    """Prefault ``times`` pages one by one, with a guest write after each prefault."""
    fixture = make_fixture()
    for page in range(times):
        fixture.vcpu.prefault_all(GPA + page * PAGE_SIZE, PAGE_SIZE)
        before = fixture.vcpu.stat("pf_taken")
        fixture.vcpu.write(GPA + page * PAGE_SIZE, 1, page)
        expect_faults(fixture.vcpu.stat("pf_taken") - before, 0, 1, f"faults on page {page}")
    expect_equal(fixture.memory.words()[:times], list(range(times)), "words that the guest wrote")


add(
    "vcpu/between-runs",
    "prefaults and KVM_RUN can alternate on one vCPU",
    _ROOT,
    lambda: _between_runs(16),
    mapping=True,
)


@case(
    "vcpu/with-an-exit-not-yet-completed",
    "a prefault between an MMIO exit and the next KVM_RUN does not change the result of the MMIO "
    "access",
    "x86.c:complete_emulated_mmio() reads kvm_run, which a prefault changes only if a signal "
    "interrupts the ioctl",
    mapping=True,
)
def exit_not_yet_completed() -> None:
    fixture = make_fixture()
    hole = GPA - 64 * PAGE_SIZE
    # The guest reads two words: one from the hole, one from memory.
    fixture.vcpu.start_at(guest_code.READ_32, rsi=hole, rcx=2, rdx=64 * PAGE_SIZE)
    expect_equal(fixture.vcpu.run(), abi.EXIT_MMIO, "exit reason")
    fixture.vcpu.kvm_run[40:44] = (1000).to_bytes(4, "little")
    before = fixture.vcpu.stat("pf_taken")
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal(fixture.vcpu.mmio, (hole, False), "MMIO access in kvm_run")
    expect_equal(fixture.vcpu.run(), abi.EXIT_IO, "exit reason at the end of the guest's program")
    value = fixture.vcpu.registers()["rbx"] & 0xFFFFFFFF
    expect_equal(value, 1000 + fixture.memory.word(0), "sum of the words that the guest read")
    taken = fixture.vcpu.stat("pf_taken") - before
    expect_faults(taken, 0, 1, "faults taken by the guest after the prefault")
