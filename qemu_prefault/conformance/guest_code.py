# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code of the programs that the guests run.

Code without a ``_32`` or ``_64`` suffix runs in 32-bit mode and in 64-bit mode. ``rsi`` holds the
first address, ``rdx`` the stride in bytes and ``rcx`` the number of pages. The last instruction of
a program writes to an I/O port. This write makes KVM_RUN return in every CPU mode. Some programs
run in an endless loop instead.
"""

from __future__ import annotations

import struct

from ..units import GIB, PAGE_SIZE

PORT = 0x10
_END = bytes([0xE6, PORT])  # out %al, $PORT

NOTHING = _END

# 1: mov %eax, (%rsi); add %rdx, %rsi; dec %ecx; jnz 1b
WRITE_32 = bytes.fromhex("8906 01d6 ffc9 75f8") + _END
WRITE_64 = bytes.fromhex("8906 4801d6 ffc9 75f7") + _END
# 1: add (%rsi), %ebx; ...
READ_32 = bytes.fromhex("031e 01d6 ffc9 75f8") + _END
READ_64 = bytes.fromhex("031e 4801d6 ffc9 75f7") + _END
# 1: jmp *%rsi; 2: add ...; each page contains jmp *%rdi, and rdi holds the address of label 2
EXECUTE_32 = bytes.fromhex("ffe6 01d6 ffc9 75f8") + _END
EXECUTE_AFTER_JUMP = 2
JUMP_BACK = bytes.fromhex("ffe7")

# 1: mov %ebp, %esi; mov %edi, %ecx
# 2: addl %eax, (%rsi); add %edx, %esi; dec %ecx; jnz 2b; incl (%rbx); jmp 1b
# All addresses are below 4 GiB, so 32-bit arithmetic also works in 64-bit mode.
ROUNDS = bytes.fromhex("89ee 89f9 0106 01d6 ffc9 75f8 ff03 ebf0")

# 1: incl (%rbx); jmp 1b
COUNT = bytes.fromhex("ff03 ebfc")

# hlt; jmp
HALT = bytes.fromhex("f4 ebfd")

# vmrun; out %al, $PORT. rax holds the address of the VMCB, whose rip is that of COUNT_AND_OUT.
VMRUN = bytes.fromhex("0f01d8") + _END
# 1: incl (%rbx); out %al, $PORT; jmp 1b. The vCPU stays in guest mode when KVM_RUN returns.
COUNT_AND_OUT = bytes.fromhex("ff03") + _END + bytes.fromhex("ebfa")

_PRESENT_RW_USER, _ACCESSED_DIRTY, _HUGE = 7, 0x60, 0x80
_EPT_RWX, _EPT_WRITE_BACK = 7, 6 << 3


def identity_tables(at: int, up_to: int) -> bytes:
    """Return 4-level identity page tables with 1 GiB pages.

    The user bit is set, so that the tables can also be used as nested page tables. The CPU treats
    nested walks as user accesses (``translate_nested_gpa()``, arch/x86/kvm/x86.c).

    :param at: The guest address where the caller stores the tables.
    :param up_to: The number of bytes that the tables map, rounded up to a multiple of 512 GiB.
    """
    return _tables(at, up_to, _PRESENT_RW_USER, _PRESENT_RW_USER | _ACCESSED_DIRTY | _HUGE)


def identity_ept(at: int, up_to: int) -> bytes:
    """Return 4-level identity EPT tables with 1 GiB pages (Intel SDM volume 3, section 30.3).

    The parameters are those of :func:`identity_tables`.
    """
    return _tables(at, up_to, _EPT_RWX, _EPT_RWX | _EPT_WRITE_BACK | _HUGE)


def _tables(at: int, up_to: int, entry: int, leaf: int) -> bytes:
    count = -(-up_to // (512 * GIB))
    top = [at + PAGE_SIZE * (1 + n) | entry for n in range(count)]
    tables = struct.pack("<512Q", *top, *[0] * (512 - count))
    for n in range(count):
        tables += struct.pack("<512Q", *(((n * 512 + i) * GIB) | leaf for i in range(512)))
    return tables
