# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPU's state when the ioctl comes: never run, idle, running, halted."""

from __future__ import annotations

import os
import signal
from struct import pack

from ...units import PAGE_SIZE
from .. import abi, guest, host
from ..memory import small
from ..suite import add, case
from ..vmm import COUNTER, Running, Task, Vcpu, Vm, expect, expect_equal, ioctl
from .common import GPA, PAGES, SLOT, Bench, bench, expect_reads, expect_writes

_MUTEX = "virt/kvm/kvm_main.c:kvm_vcpu_ioctl(): vcpu->mutex, mutex_lock_killable()"
_ROOT = "mmu/tdp_mmu.c:kvm_tdp_mmu_alloc_root(): roots are found by their role and shared"


def _fresh(*, cpuid: bool = True, mode: abi.Mode = abi.FLAT32) -> Bench:
    """A VM whose vCPU has never run."""
    memory = small(PAGES * PAGE_SIZE)
    memory.write()
    vm = Vm()
    vcpu = vm.vcpu(cpuid=cpuid, mode=mode)
    vm.slot(SLOT, GPA, memory)
    return Bench(vm, vcpu, memory)


@case("vcpu/never-run", "a vCPU that has never run can be used", _ROOT, mapping=True)
def never_run() -> None:
    machine = _fresh()
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    machine.vcpu.warm()
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "vcpu/just-created",
    "so can one without CPUID or registers, straight from KVM_CREATE_VCPU",
    "x86.c:kvm_arch_vcpu_create()",
    mapping=True,
)
def just_created() -> None:
    machine = _fresh(cpuid=False, mode=abi.RESET)
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    machine.vcpu.set_cpuid()
    machine.vcpu.set_mode(abi.FLAT32)
    machine.vcpu.warm()
    expect_writes(machine.vcpu, machine.memory, 0)


@case("vcpu/run-and-idle", "so can one that ran and is out of KVM_RUN", _ROOT, mapping=True)
def run_and_idle() -> None:
    machine = bench()
    machine.vcpu.write(GPA, 4, 0x77)
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_reads(machine.vcpu, machine.memory, 0)


@case(
    "vcpu/never-run-for-a-later-one",
    "what a vCPU maps that never runs is there for one that is created later",
    _ROOT,
    mapping=True,
)
def for_a_later_one() -> None:
    machine = _fresh()
    machine.vcpu.prefault_all(GPA, machine.size)
    later = machine.vm.vcpu()
    later.warm()
    expect_writes(later, machine.memory, 0)


@case(
    "vcpu/never-run-for-one-that-runs",
    "what a vCPU maps that never runs is there for one that has run before",
    _ROOT,
    mapping=True,
)
def for_one_that_runs() -> None:
    machine = bench()
    other = machine.vm.vcpu()
    other.prefault_all(GPA, machine.size)
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "vcpu/running-blocks",
    "on a vCPU in KVM_RUN it waits until that returns, however often it is signalled",
    _MUTEX,
    host.known_ioctl,
)
def running_blocks() -> None:
    machine = bench()
    with Running(machine.vcpu, guest.COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        # Blocked signals: it is the wait for the mutex that is looked at, not what comes after.
        task = Task(lambda: _without_signals(machine.vcpu, machine.size))
        task.wait_state("D")
        for _ in range(5):
            task.interrupt()
            running.wait_progress()
            expect(task.is_alive(), "a signal has ended the wait")
    answer = task.result()
    expect(_or_refused(answer), f"errno {answer} once the vCPU is out")
    machine.vcpu.kick(False)
    expect_reads(machine.vcpu, machine.memory, None if answer else 0)


def _without_signals(vcpu: Vcpu, size: int) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return vcpu.prefault(GPA, size, any_error=True).error


def _or_refused(answer: int) -> bool:
    return answer in (0, host.look().refusal)


@case(
    "vcpu/running-killed",
    "SIGKILL ends that wait: a process with both threads dies at once",
    _MUTEX,
    host.known_ioctl,
)
def running_killed() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            machine = bench()
            with Running(machine.vcpu, guest.COUNT, rbx=COUNTER) as running:
                running.wait_progress()
                Task(lambda: machine.vcpu.prefault(GPA, PAGE_SIZE)).wait_state("D")
                os.write(writer, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    expect_equal(os.read(reader, 1), b"!", "the child's sign that it waits")
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    expect_equal(status, -signal.SIGKILL, "the child's end")


@case(
    "vcpu/halted-blocks",
    "so it is on a vCPU that waits in hlt inside KVM_RUN: nothing runs, and still it waits",
    _MUTEX + "; x86.c:vcpu_block() is inside KVM_RUN",
    host.known_ioctl,
)
def halted_blocks() -> None:
    machine = bench(vm=Vm(irqchip=True))
    halts = machine.vcpu.stat("halt_exits")
    running = Running(machine.vcpu, guest.HALT)
    running.task.wait_state("S")
    task = Task(lambda: _without_signals(machine.vcpu, machine.size))
    task.wait_state("D")
    expect(task.is_alive(), "it has not waited")
    expect_equal(running.stop(), abi.EXIT_INTR, "how the halted vCPU ended")
    answer = task.result()
    expect(_or_refused(answer), f"errno {answer} once the vCPU is out")
    expect(machine.vcpu.stat("halt_exits") > halts, "the vCPU has not halted")
    reader = machine.vm.vcpu()
    reader.warm()
    expect_reads(reader, machine.memory, None if answer else 0)


@case(
    "vcpu/halted-and-out",
    "a halted vCPU that is out of KVM_RUN can be used",
    _ROOT,
    mapping=True,
)
def halted_and_out() -> None:
    machine = bench(vm=Vm(irqchip=True))
    running = Running(machine.vcpu, guest.HALT)
    running.task.wait_state("S")
    running.stop()
    before = machine.vm.leaves()
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    reader = machine.vm.vcpu()
    expect_reads(reader, machine.memory, None)
    expect_writes(reader, machine.memory, 0)


@case(
    "vcpu/waiting-for-sipi",
    "a vCPU that waits for its start-up interrupt can be used before it ever ran",
    _ROOT,
    mapping=True,
)
def waiting_for_sipi() -> None:
    machine = bench(vm=Vm(irqchip=True))
    second = machine.vm.vcpu()
    ioctl(second.fd, abi.SET_MP_STATE, pack("<I", 1))  # KVM_MP_STATE_UNINITIALIZED
    before = machine.vm.leaves()
    second.prefault_all(GPA, machine.size)
    expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
    expect_writes(machine.vcpu, machine.memory, 0)


@case(
    "vcpu/immediate-exit",
    "a vCPU that was told to leave KVM_RUN at once can be used all the same",
    "x86.c:kvm_arch_vcpu_ioctl_run() looks at immediate_exit, the ioctl does not",
    mapping=True,
)
def immediate_exit() -> None:
    machine = bench()
    machine.vcpu.kick()
    machine.vcpu.prefault_all(GPA, machine.size)
    machine.vcpu.kick(False)
    expect_reads(machine.vcpu, machine.memory, 0)


@case(
    "vcpu/another-runs",
    "a vCPU that is out can be used while another one runs, and that one goes on",
    "mmu/mmu.c:kvm_tdp_mmu_page_fault() takes mmu_lock for reading",
    mapping=True,
)
def another_runs() -> None:
    machine = bench()
    runner = machine.vm.vcpu()
    runner.warm()
    with Running(runner, guest.COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        before = machine.vm.leaves()
        machine.vcpu.prefault_all(GPA, machine.size)
        expect_equal((machine.vm.leaves() - before).pages_4k, PAGES, "pages mapped")
        running.wait_progress()
    expect_writes(machine.vcpu, machine.memory, 0)


def _between_runs(times: int) -> None:
    """Run, prefault a part, run on that part: over and over."""
    machine = bench()
    for page in range(times):
        machine.vcpu.prefault_all(GPA + page * PAGE_SIZE, PAGE_SIZE)
        before = machine.vcpu.stat("pf_taken")
        machine.vcpu.write(GPA + page * PAGE_SIZE, 1, page)
        expect_equal(machine.vcpu.stat("pf_taken") - before, 0, f"faults on page {page}")
    expect_equal(machine.memory.words()[:times], list(range(times)), "what was written")


add(
    "vcpu/between-runs",
    "runs and prefaults can take turns on one vCPU, page by page",
    _ROOT,
    lambda: _between_runs(16),
    mapping=True,
)


@case(
    "vcpu/with-an-exit-not-yet-completed",
    "after an exit for MMIO that userspace has yet to complete, the guest goes on as it should",
    "x86.c:complete_emulated_mmio(); prefault leaves kvm_run alone unless it is interrupted",
    mapping=True,
)
def exit_not_yet_completed() -> None:
    machine = bench()
    hole = GPA - 64 * PAGE_SIZE
    # Two words: one of the hole, one of memory.
    machine.vcpu.start_at(guest.READ_32, rsi=hole, rcx=2, rdx=64 * PAGE_SIZE)
    expect_equal(machine.vcpu.run(), abi.EXIT_MMIO, "the exit")
    machine.vcpu.kvm_run[40:44] = (1000).to_bytes(4, "little")
    before = machine.vcpu.stat("pf_taken")
    machine.vcpu.prefault_all(GPA, machine.size)
    expect_equal(machine.vcpu.mmio, (hole, False), "the MMIO that kvm_run tells of")
    expect_equal(machine.vcpu.run(), abi.EXIT_IO, "the end of the guest's program")
    value = machine.vcpu.registers()["rbx"] & 0xFFFFFFFF
    expect_equal(value, 1000 + machine.memory.word(0), "the sum that the guest reads")
    expect_equal(machine.vcpu.stat("pf_taken") - before, 0, "faults after the prefault")
