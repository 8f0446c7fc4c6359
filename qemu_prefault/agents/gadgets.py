# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the instructions and the free addresses that helpers need in QEMU."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AgentError, Code, UnsupportedError
from ..host.procfs import MemoryMapping
from ..units import PAGE_SIZE

#: The addresses for the helpers' mappings. The kernel's own top-down search for free addresses
#: (mmap_base(), arch/x86/mm/mmap.c) starts above this range and does not reach it.
AREAS_FROM, AREAS_TO = 0x1000_0000_0000, 0x5000_0000_0000

#: ``syscall; ret``.
RETURN_FROM_SYSCALL = b"\x0f\x05\xc3"
#: The signal restorers of the known C libraries.
SIGRETURNS = (
    b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",  # glibc: mov $15,%rax; syscall
    b"\xb8\x0f\x00\x00\x00\x0f\x05",  # musl: mov $15,%eax; syscall
)
#: ``mov $60,%eax; syscall``.
EXIT_THREAD = b"\xb8\x3c\x00\x00\x00\x0f\x05"


@dataclass(frozen=True, slots=True)
class Gadgets:
    """The addresses of the instructions in QEMU's text that helper threads need."""

    syscall_ret: int
    sigreturn: int
    exit_thread: int


def round_to_pages(size: int) -> int:
    """Round a size in bytes up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def find_gadgets(memory: int, maps: Sequence[MemoryMapping]) -> Gadgets:
    """Return the addresses of the instructions in QEMU that helper threads need.

    The function searches libc before QEMU's other executable mappings.

    :param memory: A file descriptor for QEMU's /proc/PID/mem.
    :raises UnsupportedError: If QEMU's text does not contain all these instructions.
    """
    text = [m for m in maps if m.perms.startswith("r-x") and m.path.startswith("/")]
    text.sort(key=lambda mapping: "libc" not in mapping.path)
    syscall_ret = sigreturn = exit_thread = 0
    for mapping in text:
        try:
            code = os.pread(memory, mapping.end - mapping.start, mapping.start)
        except OSError:
            continue

        def locate(*patterns: bytes, base: int = mapping.start, code: bytes = code) -> int:
            found = [at for pattern in patterns if (at := code.find(pattern)) >= 0]
            return base + found[0] if found else 0

        syscall_ret = syscall_ret or locate(RETURN_FROM_SYSCALL)
        sigreturn = sigreturn or locate(*SIGRETURNS)
        exit_thread = exit_thread or locate(EXIT_THREAD)
        if syscall_ret and sigreturn and exit_thread:
            return Gadgets(syscall_ret, sigreturn, exit_thread)
    raise UnsupportedError(
        "the attach agent does not support QEMU's libc, which lacks instructions that a helper "
        "thread needs",
        "use the plugin agent",
        code=Code.UNKNOWN_LIBC,
    )


def prepare_exit_slot(memory: int, maps: Sequence[MemoryMapping], gadgets: Gadgets) -> int:
    """Write the address of the exit instructions to the end of QEMU's main stack.

    A helper unmaps its own stack before it exits. Therefore it reads the address of the exit
    instructions from the last word of QEMU's main stack. In this word, the kernel stores a null
    pointer that no program reads (``__bprm_mm_init()``, fs/exec.c).

    :param memory: A file descriptor for QEMU's /proc/PID/mem.
    :returns: The address of the last word of the main stack.
    :raises UnsupportedError: If QEMU has no main stack, or if the word has an unexpected value.
    """
    stack = next((m for m in maps if m.path == "[stack]"), None)
    if stack is None:
        raise UnsupportedError(
            "QEMU's /proc/PID/maps contains no main stack",
            "use the plugin agent, and report this error",
            code=Code.UNKNOWN_LAYOUT,
        )
    slot = stack.end - 8
    wanted = gadgets.exit_thread.to_bytes(8, "little")
    found = os.pread(memory, 8, slot)
    if found not in (bytes(8), wanted):
        raise UnsupportedError(
            "the last word of QEMU's main stack is in use",
            "use the plugin agent, and report this error",
            code=Code.UNKNOWN_LAYOUT,
        )
    if found != wanted:
        os.pwrite(memory, wanted, slot)
    return slot


def free_areas(maps: Sequence[MemoryMapping], count: int, size: int) -> tuple[int, ...]:
    """Return unused addresses for ``count`` mappings of ``size`` bytes.

    The addresses are random. Therefore two qemu-prefault runs rarely choose the same addresses. If
    an address is in use when the helper starts, mmap() fails because of MAP_FIXED_NOREPLACE.

    :raises AgentError: If the function finds no unused addresses.
    """
    stride = round_to_pages(size) + 16 * PAGE_SIZE
    for _ in range(64):
        base = AREAS_FROM + secrets.randbelow((AREAS_TO - AREAS_FROM) // PAGE_SIZE) * PAGE_SIZE
        end = base + stride * count
        if not any(m.start < end and base < m.end for m in maps):
            return tuple(base + stride * index for index in range(count))
    raise AgentError(
        "qemu-prefault found no free addresses in QEMU",
        "report this error with QEMU's /proc/PID/maps",
    )
