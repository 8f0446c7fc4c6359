# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the instructions and the free addresses that helpers need in QEMU.

All of this text is untrusted, because a QEMU that its guest has taken over can map any file and can
change its memory at any time, also after this module has read it. Such a QEMU can make its own
threads execute any code, which it can do anyway. It cannot affect another process in this way,
because the native code checks after each ptrace stop that the thread belongs to QEMU
(native/ptrace/tracee.h). It can make the search fail (code ``unknown-libc``).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from ..errors import AgentError, Code, UnsupportedError
from ..host.bounded import pread_bounded
from ..host.executable import is_static
from ..host.inside_root import open_inside
from ..host.mappings import MemoryMapping
from ..host.procfs import Process
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

#: The file names of the known C libraries.
LIBC_NAMES: Final = re.compile(r"libc\.so\.6|libc-[0-9.]+\.so|ld-musl-.*|libc\.musl-.*")
_DELETED: Final = " (deleted)"
#: Limits of the search. A process has one mapping of its libc's text, which has about 2 MiB.
MAX_LIBC_MAPPINGS: Final = 4
MAX_TEXT_BYTES: Final = 64 << 20
_WINDOW: Final = 1 << 20
_OVERLAP: Final = 16  # longer than each pattern


@dataclass(frozen=True, slots=True)
class Gadgets:
    """The addresses of the instructions in QEMU's text that helper threads need."""

    syscall_ret: int
    sigreturn: int
    exit_thread: int


def round_to_pages(size: int) -> int:
    """Round a size in bytes up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def find_gadgets(process: Process, memory: int, maps: Sequence[MemoryMapping]) -> Gadgets:
    """Return the addresses of the instructions in QEMU that helper threads need.

    All of the instructions come from one mapping of the text of QEMU's libc. See
    :func:`libc_mappings`.

    :param memory: A file descriptor for QEMU's /proc/PID/mem.
    :raises UnsupportedError: If the text of QEMU's libc does not contain all these instructions.
    """
    for mapping in islice(libc_mappings(process, maps), MAX_LIBC_MAPPINGS):
        syscall_ret, sigreturn, exit_thread = _locate(
            memory, mapping, ((RETURN_FROM_SYSCALL,), SIGRETURNS, (EXIT_THREAD,))
        )
        if syscall_ret and sigreturn and exit_thread:
            return Gadgets(syscall_ret, sigreturn, exit_thread)
    raise UnsupportedError(
        "the attach agent does not support QEMU's libc, which lacks instructions that a helper "
        "thread needs",
        "use the plugin agent",
        code=Code.UNKNOWN_LIBC,
    )


def _locate(
    memory: int, mapping: MemoryMapping, wanted: Sequence[Sequence[bytes]]
) -> tuple[int, ...]:
    """Return the addresses of byte patterns in a mapping, or 0 for patterns that are absent.

    :param wanted: For each address, the alternative patterns, the preferred one first.
    """
    found = [[0] * len(patterns) for patterns in wanted]
    end = min(mapping.end, mapping.start + MAX_TEXT_BYTES)
    for start in range(mapping.start, end, _WINDOW):
        if all(any(addresses) for addresses in found):
            break
        try:
            code = pread_bounded(memory, min(_WINDOW + _OVERLAP, end - start), start)
        except OSError:
            continue
        for patterns, addresses in zip(wanted, found, strict=True):
            for index, pattern in enumerate(patterns):
                at = -1 if addresses[index] else code.find(pattern)
                if at >= 0:
                    addresses[index] = start + at
    return tuple(next(filter(None, addresses), 0) for addresses in found)


def libc_mappings(process: Process, maps: Sequence[MemoryMapping]) -> Iterator[MemoryMapping]:
    """Yield the mappings of the text of a process's own libc.

    The mappings are executable, private and not writable. Their file has the name of a known libc,
    or is the statically linked program that the process executes. The file belongs to root or to
    the owner of this program.
    """
    program = f"{process.proc}/exe"
    static = is_static(program)
    try:
        owner = os.stat(program)
    except OSError:
        return
    for mapping in maps:
        if mapping.perms != "r-xp" or not mapping.path.startswith("/"):
            continue
        name = os.path.basename(mapping.path.removesuffix(_DELETED))
        named = LIBC_NAMES.fullmatch(name) is not None
        if not named and not static:
            continue
        status = _file_of(process, mapping)
        if status is None:
            # A process that runs as QEMU's user has no more privileges than QEMU.
            if named and os.geteuid() == process.status().uids[1]:
                yield mapping
        elif status.st_uid in (0, owner.st_uid) and (named or os.path.samestat(status, owner)):
            yield mapping


def _file_of(process: Process, mapping: MemoryMapping) -> os.stat_result | None:
    """Return the status of a mapped file, or None if this process cannot access the file.

    map_files leads to the mapped file itself, but needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    The path leads to another file if the file has been replaced. The device number in maps is not
    compared, because it differs from that of stat(2) on btrfs and overlayfs.
    """
    try:
        return os.stat(f"{process.proc}/map_files/{mapping.start:x}-{mapping.end:x}")
    except OSError:
        pass
    try:
        with open_inside(process, mapping.path) as found:
            status = os.fstat(found)
    except (OSError, ValueError, UnsupportedError):
        return None
    return status if status.st_ino == mapping.inode else None


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
    found = pread_bounded(memory, 8, slot)
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
