# SPDX-License-Identifier: GPL-2.0-or-later
"""Evaluate seccomp filters, which are classic BPF programs.

This module supports the instructions that ``seccomp_check_filter()`` (kernel/seccomp.c) accepts.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

AUDIT_ARCH_X86_64: Final = 0xC000003E  # include/uapi/linux/audit.h
WORD: Final = 0xFFFFFFFF
DATA_BYTES: Final = 64  # struct seccomp_data

ACTION_FULL: Final = 0xFFFF0000  # include/uapi/linux/seccomp.h
RET_LOG: Final = 0x7FFC0000
RET_ALLOW: Final = 0x7FFF0000


class Number(enum.IntEnum):
    """The x86-64 numbers of the system calls that a helper or its injection makes."""

    mmap = 9
    munmap = 11
    rt_sigaction = 13
    rt_sigprocmask = 14
    rt_sigreturn = 15
    ioctl = 16
    madvise = 28
    nanosleep = 35
    clone = 56
    exit = 60
    kill = 62
    prctl = 157
    set_tid_address = 218
    restart_syscall = 219
    timer_create = 222
    timer_settime = 223
    timer_delete = 226
    clock_gettime = 228


@dataclass(frozen=True, slots=True)
class Call:
    """A system call with the properties that a seccomp filter evaluates.

    :ivar arguments: The arguments of the system call. Omitted arguments are 0.
    :ivar address: The instruction pointer after the ``syscall`` instruction.
    """

    number: Number
    arguments: tuple[int, ...] = ()
    address: int = 0

    def data(self) -> bytes:
        """Return the ``struct seccomp_data`` that the kernel passes to filters."""
        arguments = [value & (1 << 64) - 1 for value in (*self.arguments, *[0] * 6)[:6]]
        return struct.pack("<iIQ6Q", self.number, AUDIT_ARCH_X86_64, self.address, *arguments)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One BPF instruction with the fields of ``struct sock_filter``."""

    code: int
    if_true: int
    if_false: int
    constant: int


Filter = Sequence[Instruction]


class BadFilterError(Exception):
    """The error for a truncated filter, or for one that the kernel does not accept."""


def parse_filters(data: bytes) -> list[list[Instruction]]:
    """Return the filters in the output of ``pf_read_filters()``.

    :raises BadFilterError: If the output is truncated.
    """
    filters = []
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise BadFilterError("the length of a filter is truncated")
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + 8 * count > len(data):
            raise BadFilterError("a filter is truncated")
        filters.append(
            [
                Instruction(*fields)
                for fields in struct.iter_unpack("<HBBI", data[at : at + 8 * count])
            ]
        )
        at += 8 * count
    return filters


def denied(filters: Sequence[Filter], calls: Sequence[Call]) -> tuple[str, ...]:
    """Return the names of the calls that at least one filter denies.

    The names are in the order of ``calls``. The kernel runs all filters and applies the strictest
    result. The results ALLOW and LOG allow a call. This function treats all other results as a
    denial, including TRACE and USER_NOTIF, because a tracer or supervisor may deny the call.
    """
    names: dict[str, None] = {}
    for call in calls:
        data = call.data()
        if not all(_allows(program, data) for program in filters):
            names[call.number.name] = None
    return tuple(names)


def _allows(program: Filter, data: bytes) -> bool:
    try:
        return run_filter(program, data) & ACTION_FULL in (RET_ALLOW, RET_LOG)
    except BadFilterError:
        return False


# include/uapi/linux/bpf_common.h: classes, and the fields of each
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_MODE, _IMM, _ABS, _MEM, _LEN = 0xE0, 0x00, 0x20, 0x60, 0x80
_X, _A = 0x08, 0x10
_JA = 0x00


def run_filter(program: Filter, data: bytes) -> int:
    """Run one filter on a ``struct seccomp_data``, and return the filter's result.

    :raises BadFilterError: If the filter jumps out of the program, or if it contains an unsupported
        instruction.
    """
    accumulator = index = at = 0
    memory = [0] * 16
    # All jumps are forward jumps, so each instruction runs at most once.
    while at < len(program):
        i = program[at]
        at += 1
        kind, operand = i.code & 7, index if i.code & _X else i.constant
        if kind == _RET:
            return accumulator if i.code & _A else i.constant
        if kind in (_LD, _LDX):
            value = _load(i, data, memory)
            accumulator, index = (value, index) if kind == _LD else (accumulator, value)
        elif kind in (_ST, _STX):
            if i.constant >= len(memory):
                raise BadFilterError(f"BPF scratch word {i.constant} does not exist")
            memory[i.constant] = accumulator if kind == _ST else index
        elif kind == _ALU:
            accumulator = _compute(i.code & 0xF0, accumulator, operand)
        elif kind == _JMP:
            if i.code & 0xF0 == _JA:
                at += i.constant
            else:
                at += i.if_true if _compare(i.code & 0xF0, accumulator, operand) else i.if_false
        elif i.code & 0xF8:
            accumulator = index  # BPF_TXA
        else:
            index = accumulator  # BPF_TAX
    raise BadFilterError("the program ends without a return instruction")


def _load(i: Instruction, data: bytes, memory: Sequence[int]) -> int:
    mode = i.code & _MODE
    if mode == _IMM:
        return i.constant
    if mode == _LEN:
        return DATA_BYTES
    if mode == _ABS and i.constant + 4 <= len(data) and not i.constant % 4:
        return int.from_bytes(data[i.constant : i.constant + 4], "little")
    if mode == _MEM and i.constant < len(memory):
        return memory[i.constant]
    raise BadFilterError(f"unsupported load {i.code:#x} of {i.constant}")


def _compute(operation: int, a: int, b: int) -> int:  # noqa: PLR0911
    match operation >> 4:
        case 0:
            return (a + b) & WORD
        case 1:
            return (a - b) & WORD
        case 2:
            return (a * b) & WORD
        case 3 if b:
            return a // b
        case 4:
            return a | b
        case 5:
            return a & b
        case 6:
            return (a << (b & 31)) & WORD
        case 7:
            return a >> (b & 31)
        case 8:
            return -a & WORD
        case 10:
            return a ^ b
    raise BadFilterError(f"unsupported operation {operation:#x} with {b}")


def _compare(operation: int, a: int, b: int) -> bool:
    match operation >> 4:
        case 1:
            return a == b
        case 2:
            return a > b
        case 3:
            return a >= b
        case 4:
            return bool(a & b)
    raise BadFilterError(f"unsupported jump {operation:#x}")
