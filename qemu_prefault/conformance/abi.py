# SPDX-License-Identifier: GPL-2.0-or-later
"""Constants and structures of KVM's userspace API.

The values are copied from include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, because the
installed kernel headers are often older than the running kernel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields, replace

_KVMIO = 0xAE
_WRITE, _READ = 1, 2


def _io(number: int, direction: int = 0, size: int = 0) -> int:
    return direction << 30 | size << 16 | _KVMIO << 8 | number


# Ioctls on /dev/kvm.
CREATE_VM = _io(0x01)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _io(0x05, _READ | _WRITE, 8)

# Ioctls on a VM.
CREATE_VCPU = _io(0x41)
GET_DIRTY_LOG = _io(0x42, _WRITE, 16)
SET_NR_MMU_PAGES = _io(0x44)
SET_USER_MEMORY_REGION = _io(0x46, _WRITE, 32)
SET_TSS_ADDR = _io(0x47)
SET_USER_MEMORY_REGION2 = _io(0x49, _WRITE, 160)
CREATE_IRQCHIP = _io(0x60)
GET_CLOCK = _io(0x7C, _READ, 48)
ENABLE_CAP = _io(0xA3, _WRITE, 104)
SIGNAL_MSI = _io(0xA5, _WRITE, 32)
RESET_DIRTY_RINGS = _io(0xC7)
GET_STATS_FD = _io(0xCE)
SET_MEMORY_ATTRIBUTES = _io(0xD2, _WRITE, 32)
CREATE_GUEST_MEMFD = _io(0xD4, _READ | _WRITE, 64)

# Ioctls on a vCPU.
RUN = _io(0x80)
SET_REGS = _io(0x82, _WRITE, 144)
GET_REGS = _io(0x81, _READ, 144)
SET_SREGS = _io(0x84, _WRITE, 312)
GET_MSRS = _io(0x88, _READ | _WRITE, 8)
SET_MSRS = _io(0x89, _WRITE, 8)
SET_CPUID2 = _io(0x90, _WRITE, 8)
SET_MP_STATE = _io(0x99, _WRITE, 4)
GET_VCPU_EVENTS = _io(0x9F, _READ, 64)
SET_VCPU_EVENTS = _io(0xA0, _WRITE, 64)
SET_NESTED_STATE = _io(0xBF, _WRITE, 128)
PRE_FAULT_MEMORY = _io(0xD5, _READ | _WRITE, 64)

CAP_MAX_VCPUS = 66
CAP_X86_SMM = 117
CAP_MAX_VCPU_ID = 128
CAP_DIRTY_LOG_RING = 192
CAP_DISABLE_QUIRKS2 = 213
CAP_VM_TYPES = 235
CAP_GUEST_MEMFD_FLAGS = 244

VM_DEFAULT, VM_SW_PROTECTED = 0, 1
QUIRK_SLOT_ZAP_ALL = 1 << 7
MEM_LOG_DIRTY_PAGES, MEM_READONLY, MEM_GUEST_MEMFD = 1, 2, 4
MEMORY_ATTRIBUTE_PRIVATE = 1 << 3
GMEM_MMAP, GMEM_INIT_SHARED = 1, 2
#: The bit in a slot number that selects the address space for system management mode.
SMM_SPACE = 1 << 16

EXIT_IO, EXIT_HLT, EXIT_MMIO, EXIT_INTR, EXIT_MEMORY_FAULT = 2, 5, 6, 10, 39
EXIT_NAMES = {
    0: "UNKNOWN", 2: "IO", 4: "DEBUG", 5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY",
    10: "INTR", 17: "INTERNAL_ERROR", 31: "DIRTY_RING_FULL", 39: "MEMORY_FAULT",
}  # fmt: skip
MP_RUNNABLE = 0
CLOCK_TSC_STABLE = 2
DIRTY_RING_PAGE_OFFSET = 64
DIRTY_GFN_SIZE = 16

_SEGMENT = struct.Struct("<QIH10B")
_SREGS_TAIL = struct.Struct("<QH6xQH6x7Q4Q")
_REGS = struct.Struct("<18Q")


@dataclass(frozen=True)
class Segment:
    """A ``struct kvm_segment``.

    The default values describe a flat data segment of 4 GiB.
    """

    base: int = 0
    limit: int = 0xFFFFFFFF
    selector: int = 0x10
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 1
    s: int = 1
    l: int = 0  # noqa: E741
    g: int = 1
    avl: int = 0
    unusable: int = 0
    padding: int = 0

    def pack(self) -> bytes:
        return _SEGMENT.pack(*(getattr(self, field.name) for field in fields(self)))


CODE_32 = Segment(selector=0x8, type=11)
CODE_64 = Segment(selector=0x8, type=11, db=0, l=1)
DATA = Segment()
CODE_16 = Segment(selector=0, limit=0xFFFF, type=11, db=0, g=0)
DATA_16 = Segment(selector=0, limit=0xFFFF, type=3, db=0, g=0)
_TASK = Segment(selector=0x18, limit=0xFFFF, type=11, db=0, s=0, g=0)
_LDT = Segment(selector=0, limit=0xFFFF, type=2, db=0, s=0, g=0)

CR0_PE, CR0_NE, CR0_WP, CR0_PG = 1, 1 << 5, 1 << 16, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA, EFER_SVME = 1 << 8, 1 << 10, 1 << 12


@dataclass(frozen=True)
class CpuMode:
    """The fields of ``struct kvm_sregs`` that differ between CPU modes."""

    code: Segment
    data: Segment
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0

    def pack(self) -> bytes:
        """Return a ``struct kvm_sregs`` that contains these fields."""
        segments = [self.code, *[self.data] * 5, _TASK, _LDT]
        return b"".join(segment.pack() for segment in segments) + _SREGS_TAIL.pack(
            0, 0xFFFF, 0, 0xFFFF, self.cr0, 0, self.cr3, self.cr4, 0, self.efer, 0xFEE00900,
            *(0,) * 4,
        )  # fmt: skip

    def with_efer(self, bits: int) -> CpuMode:
        return replace(self, efer=self.efer | bits)


RESET = CpuMode(CODE_16, DATA_16, cr0=0x60000010)
FLAT32 = CpuMode(CODE_32, DATA, cr0=CR0_PE | CR0_NE | 1 << 4)


def long_mode(cr3: int) -> CpuMode:
    """Return the 64-bit mode with page tables at the guest address ``cr3``."""
    cr0 = CR0_PE | CR0_NE | CR0_WP | CR0_PG | 1 << 4
    return CpuMode(CODE_64, DATA, cr0, cr3, CR4_PAE, EFER_LME | EFER_LMA)


REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
             *(f"r{number}" for number in range(8, 16)), "rip", "rflags")  # fmt: skip


def pack_regs(**values: int) -> bytes:
    """Return a ``struct kvm_regs`` with these values.

    The default of ``rflags`` is 2. The default of every other register is 0.
    """
    values = {"rflags": 2, **values}
    return _REGS.pack(*(values.get(name, 0) for name in REGISTERS))


def unpack_regs(data: bytes) -> dict[str, int]:
    return dict(zip(REGISTERS, _REGS.unpack(data), strict=True))
