# SPDX-License-Identifier: GPL-2.0-or-later
"""Check whether a program is statically linked, and find a script's interpreter."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Final

#: Maximum number of nested script interpreters (exec_binprm() in fs/exec.c).
MAX_SCRIPTS: Final = 5
_ET_EXEC, _ET_DYN = 2, 3
_PT_DYNAMIC, _PT_INTERP = 2, 3
_DT_FLAGS_1, _DF_1_PIE = 0x6FFFFFFB, 0x08000000
_MAX_SEGMENTS: Final = 1000
_MAX_DYNAMIC: Final = 1 << 16


def is_static(path: str) -> bool:
    """Return whether a file is an ELF program that needs no dynamic linker.

    The result is False if the file is unreadable, is a script or has another format. A shared
    object without an interpreter is a static program only if it has the DF_1_PIE flag. The dynamic
    linker is a shared object without this flag.

    The function does not wait if the owner of the file has a lease on it (F_SETLEASE, fcntl(2)).
    """
    try:
        with open(path, "rb", opener=_open_without_wait) as file:
            return _elf_is_static(file)
    except (OSError, ValueError, struct.error):  # ValueError: the offset exceeds off_t
        return False


def _open_without_wait(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _elf_is_static(file: BinaryIO) -> bool:
    ident = file.read(16)
    if (
        len(ident) < 16
        or ident[:4] != b"\x7fELF"
        or ident[4] not in (1, 2)
        or ident[5] not in (1, 2)
    ):
        return False
    order, wide = "<>"[ident[5] - 1], ident[4] == 2
    header = struct.Struct(order + ("HHIQQQIHHH" if wide else "HHIIIIIHHH"))
    segment = struct.Struct(order + ("IIQQQQ" if wide else "IIIIII"))
    kind, _, _, _, offset, _, _, _, size, count = header.unpack(file.read(header.size))
    dynamic = b""
    for number in range(min(count, _MAX_SEGMENTS)):
        file.seek(offset + number * size)
        fields = segment.unpack(file.read(segment.size))
        if fields[0] == _PT_INTERP:
            return False
        if fields[0] == _PT_DYNAMIC:
            start, length = (fields[2], fields[5]) if wide else (fields[1], fields[4])
            file.seek(start)
            dynamic = file.read(min(length, _MAX_DYNAMIC))
    if kind == _ET_DYN:
        return _is_position_independent_program(dynamic, order + ("QQ" if wide else "II"))
    return bool(kind == _ET_EXEC)


def _is_position_independent_program(dynamic: bytes, entry: str) -> bool:
    whole = len(dynamic) - len(dynamic) % struct.calcsize(entry)
    return any(
        tag == _DT_FLAGS_1 and value & _DF_1_PIE
        for tag, value in struct.iter_unpack(entry, dynamic[:whole])
    )


def script_interpreter(path: str) -> str | None:
    """Return the path of the program that the kernel runs for a script.

    The result is None if the file is not a script, or if the file or an interpreter cannot be read.
    """
    for depth in range(MAX_SCRIPTS):
        try:
            with open(path, "rb") as file:
                line = file.read(256).partition(b"\n")[0]
        except (OSError, ValueError):  # ValueError: the path contains a null byte
            return None
        if not line.startswith(b"#!") or not line[2:].split():
            return path if depth else None
        path = os.fsdecode(line[2:].split()[0])
    return path
