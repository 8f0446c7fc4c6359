# SPDX-License-Identifier: GPL-2.0-or-later
"""A minimal VMM that creates VMs with a few pages of memory.

Slot 0 of each VM is the system memory, which contains programs, page tables and a counter. The VMM
populates the system memory, and the guest accesses this memory before a case counts faults. The
case therefore counts only faults on the memory that it tests.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from .._native import lib
from ..host.kvm import BinaryStats, Stage2Leaves
from ..units import GIB, PAGE_SIZE
from . import abi, guest_code
from .device import IOCTL_LIMIT_SECONDS, address_of, ioctl, kvm_fd, offers_prefault, supported_cpuid
from .expectations import error_name, expect, expect_equal
from .memory import Memory, small

SYSTEM_BYTES = 64 * PAGE_SIZE
PROGRAMS, COUNTER, TABLES = 0x1000, 0x3000, 0x4000


class IoctlRefused(Exception):
    """The ioctl failed on a host that does not offer it.

    The runner checks the errno.
    """

    def __init__(self, vcpu: KvmVcpu, error: int, gpa: int, size: int) -> None:
        super().__init__(f"refused: {error_name(error)}")
        self.vcpu, self.error, self.gpa, self.size = vcpu, error, gpa, size


@dataclass(frozen=True)
class IoctlResult:
    """The result of one ``KVM_PRE_FAULT_MEMORY`` ioctl.

    :ivar error: The errno, or 0 for success.
    :ivar left: The ``size`` that the kernel wrote back, in bytes.
    :ivar seconds: The duration of the ioctl.
    """

    error: int
    left: int
    seconds: float

    def __str__(self) -> str:
        return f"{error_name(self.error)}, {self.left:#x} bytes left"


@dataclass
class Slot:
    number: int
    gpa: int
    size: int
    memory: Memory | None
    flags: int = 0
    offset: int = 0
    gmem: int = -1


class KvmVm:
    """A VM whose only memory is initially the system memory.

    :param kind: ``abi.VM_DEFAULT`` or ``abi.VM_SW_PROTECTED``.
    :param irqchip: True to create a local APIC in the kernel, so that ``hlt`` waits inside KVM_RUN.
    :param dirty_ring: The size of each vCPU's dirty ring in bytes, or 0 to use no dirty ring.
    :param quirk: False to disable KVM_X86_QUIRK_SLOT_ZAP_ALL.
    """

    def __init__(
        self,
        kind: int = abi.VM_DEFAULT,
        *,
        irqchip: bool = False,
        dirty_ring: int = 0,
        quirk: bool = True,
    ) -> None:
        self.fd = ioctl(kvm_fd(), abi.CREATE_VM, kind)
        self.irqchip = irqchip
        self.dirty_ring = dirty_ring
        self.slots: dict[int, Slot] = {}
        self.vcpus: list[KvmVcpu] = []
        self._programs: dict[bytes, int] = {}
        self._next_program = PROGRAMS
        # kvm_intel requires this ioctl (Documentation/virt/kvm/api.rst). kvm_amd ignores it.
        with contextlib.suppress(OSError):
            ioctl(self.fd, abi.SET_TSS_ADDR, 0xFFFBD000)
        if irqchip:
            ioctl(self.fd, abi.CREATE_IRQCHIP)
        if dirty_ring:
            self.enable(abi.CAP_DIRTY_LOG_RING, dirty_ring)
        if not quirk:
            self.enable(abi.CAP_DISABLE_QUIRKS2, abi.QUIRK_SLOT_ZAP_ALL)
        self.system = small(SYSTEM_BYTES)
        self.system.populate()
        self.system.put(TABLES, guest_code.identity_tables(TABLES, 1024 * GIB))
        self.slot(0, 0, self.system)
        self.stats = BinaryStats(ioctl(self.fd, abi.GET_STATS_FD))

    def enable(self, capability: int, *arguments: int) -> None:
        words = [*arguments, *[0] * (4 - len(arguments))]
        ioctl(self.fd, abi.ENABLE_CAP, struct.pack("<II4Q64x", capability, 0, *words))

    def check(self, capability: int) -> int:
        return ioctl(self.fd, abi.CHECK_EXTENSION, capability)

    def slot(
        self,
        number: int,
        gpa: int,
        memory: Memory,
        *,
        offset: int = 0,
        size: int | None = None,
        flags: int = 0,
        gmem: int = -1,
    ) -> Slot:
        """Create a slot, or change the address or flags of an existing slot.

        :param number: The slot number. Bit 16 selects the address space.
        :param gpa: The guest address of the slot.
        :param offset: The offset in bytes at which the slot starts in ``memory``.
        :param size: The size in bytes, or None for the rest of ``memory``.
        :param gmem: The descriptor of a guest_memfd for private memory, or -1.
        """
        slot = Slot(number, gpa, memory.size - offset if size is None else size, memory, flags,
                    offset, gmem)  # fmt: skip
        self._set(slot)
        self.slots[number] = slot
        return slot

    def delete(self, number: int) -> None:
        self._set(Slot(number, 0, 0, None))
        del self.slots[number]

    def _set(self, slot: Slot) -> None:
        hva = slot.memory.address + slot.offset if slot.memory else 0
        region = struct.pack("<II3Q", slot.number, slot.flags, slot.gpa, slot.size, hva)
        if slot.gmem < 0:
            ioctl(self.fd, abi.SET_USER_MEMORY_REGION, region)
            return
        # gmem offset, gmem fd, padding
        region += struct.pack("<QI4x112x", 0, slot.gmem)
        ioctl(self.fd, abi.SET_USER_MEMORY_REGION2, region)

    def guest_memfd(self, size: int, flags: int = 0) -> int:
        data = bytearray(struct.pack("<QQ48x", size, flags))
        return ioctl(self.fd, abi.CREATE_GUEST_MEMFD, data)

    def set_private(self, gpa: int, size: int, private: bool = True) -> None:
        attributes = abi.MEMORY_ATTRIBUTE_PRIVATE if private else 0
        ioctl(self.fd, abi.SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", gpa, size, attributes, 0))

    def dirty_pages(self, number: int) -> set[int]:
        """Read and clear a slot's dirty log, and return the numbers of the dirty pages."""
        count = self.slots[number].size // PAGE_SIZE
        bitmap = bytearray(-(-count // 64) * 8)
        ioctl(self.fd, abi.GET_DIRTY_LOG, struct.pack("<IIQ", number, 0, address_of(bitmap)))
        return {page for page in range(count) if bitmap[page // 8] >> page % 8 & 1}

    def has_master_clock(self) -> bool:
        """Return whether KVM uses the master clock for the VM's kvm-clock."""
        clock = bytearray(48)
        ioctl(self.fd, abi.GET_CLOCK, clock)
        return bool(struct.unpack_from("<I", clock, 8)[0] & abi.CLOCK_TSC_STABLE)

    def signal_init(self, apic_id: int) -> int:
        """Send an INIT to a local APIC, and return the number of vCPUs that received it."""
        # struct kvm_msi: address, data and flags; the delivery mode 5 is INIT.
        message = struct.pack("<4I16x", 0xFEE00000 | apic_id << 12, 0, 5 << 8, 0)
        return ioctl(self.fd, abi.SIGNAL_MSI, message)

    def leaves(self) -> Stage2Leaves:
        return Stage2Leaves(*self.stats.read(*Stage2Leaves.__dataclass_fields__))

    def vcpu(self, *, cpuid: bool = True, mode: abi.CpuMode = abi.FLAT32) -> KvmVcpu:
        vcpu = KvmVcpu(self, len(self.vcpus), cpuid, mode)
        self.vcpus.append(vcpu)
        return vcpu

    def program(self, code: bytes) -> int:
        """Copy a program to the system memory, and return the program's guest address.

        A program that is already in the system memory is not copied again.
        """
        if code not in self._programs:
            self._programs[code] = self._next_program
            self.system.put(self._next_program, code)
            self._next_program += -(-len(code) // 16) * 16
        return self._programs[code]

    @property
    def counter(self) -> int:
        """The value of the counter that some guest programs increment."""
        return self.system.word(COUNTER)


LONG64 = abi.long_mode(TABLES)


class KvmVcpu:
    """A vCPU of a :class:`KvmVm`.

    By default, :meth:`KvmVm.vcpu` creates a vCPU in 32-bit protected mode without paging.
    """

    def __init__(self, vm: KvmVm, number: int, cpuid: bool, mode: abi.CpuMode) -> None:
        self.vm = vm
        self.number = number
        self.fd = ioctl(vm.fd, abi.CREATE_VCPU, number)
        self.mode = mode
        if cpuid:
            self.set_cpuid()
        self.set_mode(mode)
        if vm.irqchip:
            ioctl(self.fd, abi.SET_MP_STATE, struct.pack("<I", abi.MP_RUNNABLE))
        size = ioctl(kvm_fd(), abi.GET_VCPU_MMAP_SIZE)
        self.kvm_run = mmap.mmap(self.fd, size)
        self.stats = BinaryStats(ioctl(self.fd, abi.GET_STATS_FD))

    def set_cpuid(self) -> None:
        ioctl(self.fd, abi.SET_CPUID2, supported_cpuid())

    def set_mode(self, mode: abi.CpuMode) -> None:
        self.mode = mode
        ioctl(self.fd, abi.SET_SREGS, mode.pack())

    def set_msr(self, index: int, value: int) -> None:
        ioctl(self.fd, abi.SET_MSRS, struct.pack("<IIIIQ", 1, 0, index, 0, value))

    def get_msr(self, index: int) -> int:
        """Return the value of an MSR.

        :raises OSError: If KVM does not emulate the MSR.
        """
        data = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        if ioctl(self.fd, abi.GET_MSRS, data) != 1:
            raise OSError(errno.ENOENT, f"KVM does not emulate MSR {index:#x}")
        return int(struct.unpack_from("<Q", data, 16)[0])

    def set_smm(self, on: bool) -> None:
        """Enter or leave SMM with ``KVM_SET_VCPU_EVENTS``, as QEMU does."""
        events = bytearray(64)
        ioctl(self.fd, abi.GET_VCPU_EVENTS, events)
        # struct kvm_vcpu_events: flags at offset 20 (KVM_VCPUEVENT_VALID_SMM is 8), smi.smm at 24.
        struct.pack_into("<I", events, 20, struct.unpack_from("<I", events, 20)[0] | 8)
        events[24] = on
        ioctl(self.fd, abi.SET_VCPU_EVENTS, bytes(events))

    def set_nested_state(self, state: bytes) -> None:
        """Load a ``struct kvm_nested_state``, which includes its data."""
        ioctl(self.fd, abi.SET_NESTED_STATE, state)

    def registers(self) -> dict[str, int]:
        data = bytearray(144)
        ioctl(self.fd, abi.GET_REGS, data)
        return abi.unpack_regs(bytes(data))

    def stat(self, name: str) -> int:
        return self.stats.read(name)[0]

    def prefault(
        self,
        gpa: int,
        size: int,
        *,
        limit: float = IOCTL_LIMIT_SECONDS,
        flags: int = 0,
        padding: int = 0,
        call: Callable[[int, int, int], int] | None = None,
        any_error: bool = False,
    ) -> IoctlResult:
        """Issue ``KVM_PRE_FAULT_MEMORY`` once.

        :param limit: The time in seconds after which repeated signals interrupt the ioctl.
        :param padding: The value of each 64-bit word in the structure's padding.
        :param call: A function that issues the ioctl, or None to issue the ioctl in this thread.
        :param any_error: True to return every error, even if the host does not offer the ioctl.
        :raises IoctlRefused: If ``any_error`` is False, and the ioctl fails on a host that does not
            offer it.
        """
        arguments = bytearray(struct.pack("<8Q", gpa, size, flags, *[padding] * 5))
        before = self.vm.leaves()
        started = time.monotonic()
        if call is not None:
            answer = call(self.fd, abi.PRE_FAULT_MEMORY, address_of(arguments))
        else:
            answer = lib.pf_vmm_ioctl_limited(
                self.fd, abi.PRE_FAULT_MEMORY, address_of(arguments), int(limit * 1e9)
            )
        seconds = time.monotonic() - started
        if answer < 0 and not any_error and not offers_prefault():
            expect_equal(self.vm.leaves(), before, "leaves after the refused ioctl")
            raise IoctlRefused(self, -int(answer), gpa, size)
        left = struct.unpack_from("<Q", arguments, 8)[0]
        return IoctlResult(max(0, -int(answer)), left, seconds)

    def prefault_all(self, gpa: int, size: int) -> None:
        """Issue the ioctl until no bytes are left.

        :raises Unexpected: If the ioctl fails or makes no progress.
        """
        while size:
            result = self.prefault(gpa, size)
            expect_equal(error_name(result.error), "success", f"the prefault of {gpa:#x}+{size:#x}")
            expect(result.left < size, f"the prefault of {gpa:#x}+{size:#x} made no progress")
            gpa, size = gpa + size - result.left, result.left

    def run(self, limit: float = IOCTL_LIMIT_SECONDS) -> int:
        """Issue KVM_RUN once, and return the exit reason.

        If a signal interrupts KVM_RUN, the exit reason is ``abi.EXIT_INTR``.

        :param limit: The time in seconds after which repeated signals interrupt KVM_RUN. 0 means
            no limit.
        """
        answer = lib.pf_vmm_ioctl_limited(self.fd, abi.RUN, 0, int(limit * 1e9))
        if answer < 0 and answer not in (-errno.EINTR, -errno.EFAULT):
            raise OSError(-answer, f"KVM_RUN: {os.strerror(-answer)}")
        if answer == -errno.EFAULT and self.exit_reason != abi.EXIT_MEMORY_FAULT:
            raise OSError(errno.EFAULT, "KVM_RUN cannot access the host memory of a guest page")
        return abi.EXIT_INTR if answer == -errno.EINTR else self.exit_reason

    @property
    def exit_reason(self) -> int:
        return int(struct.unpack_from("<I", self.kvm_run, 8)[0])

    @property
    def mmio(self) -> tuple[int, bool]:
        """The address of the last MMIO exit, and True if the access was a write."""
        address, is_write = struct.unpack_from("<Q12xB", self.kvm_run, 32)
        return address, bool(is_write)

    @property
    def memory_fault(self) -> tuple[int, int, int]:
        """The flags, guest address and size of the last memory fault exit."""
        flags, gpa, size = struct.unpack_from("<3Q", self.kvm_run, 32)
        return flags, gpa, size

    def start_at(self, code: bytes, **registers: int) -> None:
        rip = self.vm.program(code)
        ioctl(self.fd, abi.SET_REGS, abi.pack_regs(rip=rip, **registers))

    def call(self, code: bytes, **registers: int) -> dict[str, int]:
        """Run a program to its end, and return the registers of the vCPU.

        :raises Unexpected: If the program does not end within :data:`IOCTL_LIMIT_SECONDS`.
        """
        self.start_at(code, **registers)
        reason = self.run()
        expect(
            reason != abi.EXIT_INTR,
            f"the guest's program did not end within {IOCTL_LIMIT_SECONDS:g} s",
        )
        expect_equal(
            abi.EXIT_NAMES.get(reason, str(reason)),
            "IO",
            "exit reason at the end of the guest's program",
        )
        return self.registers()

    @property
    def _long(self) -> bool:
        return bool(self.mode.efer & abi.EFER_LMA)

    def warm(self) -> None:
        """Make the guest read all system memory, so that later accesses do not fault."""
        self.call(guest_code.NOTHING)
        self.read(COUNTER, 1)
        self.read(0, SYSTEM_BYTES // PAGE_SIZE)

    def read(self, gpa: int, pages: int, stride: int = PAGE_SIZE) -> int:
        """Make the guest read the first word of each page, and return the words' sum.

        :param stride: The distance in bytes between two words.
        :returns: The sum of the 32-bit words modulo 2**32.
        """
        code = guest_code.READ_64 if self._long else guest_code.READ_32
        return self.call(code, rsi=gpa, rcx=pages, rdx=stride)["rbx"] & 0xFFFFFFFF

    def write(self, gpa: int, pages: int, value: int, stride: int = PAGE_SIZE) -> None:
        """Make the guest write ``value`` to the first 32-bit word of each page.

        :param stride: The distance in bytes between two words.
        """
        code = guest_code.WRITE_64 if self._long else guest_code.WRITE_32
        self.call(code, rsi=gpa, rcx=pages, rdx=stride, rax=value)

    def faults_of(self, what: Callable[[], object]) -> int:
        """Call a function, and return the number of stage-2 faults during the call."""
        before = self.stat("pf_taken")
        what()
        return self.stat("pf_taken") - before

    def kick(self, on: bool = True) -> None:
        """Set or clear ``immediate_exit`` in kvm_run.

        While ``immediate_exit`` is set, KVM_RUN returns immediately. A thread that is already in
        KVM_RUN returns only if it also gets a signal.
        """
        self.kvm_run[1] = on
