# SPDX-License-Identifier: GPL-2.0-or-later
"""Execute a program under seccomp filters.

usage: under_filter.py ACTION[,ACTION...] CALL... -- PROGRAM...

Each ACTION adds one filter, which takes this action for each CALL. An ACTION is kill, errno, trap,
log or allow. A CALL is the number of a system call, or NUMBER:INDEX=VALUE. The latter matches calls
whose argument INDEX, counted from 0, is VALUE.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

ACTIONS = {
    "kill": 0x80000000,
    "trap": 0x00030000,
    "errno": 0x00050001,
    "log": 0x7FFC0000,
    "allow": 0x7FFF0000,
}
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
PR_SET_NO_NEW_PRIVS, SECCOMP, SET_MODE_FILTER = 38, 317, 1


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def filter_of(action: str, calls: list[str]) -> bytes:
    """Return the instructions of one filter."""
    code = []
    for call in calls:
        number, _, condition = call.partition(":")
        tests = [(0, int(number))]
        if condition:
            index, _, value = condition.partition("=")
            wanted, at = int(value, 0), 16 + 8 * int(index)
            tests += [(at, wanted & 0xFFFFFFFF), (at + 4, wanted >> 32)]
        for done, (offset, value_) in enumerate(tests):
            skip = 2 * (len(tests) - done) - 1  # skip the return
            code += [(LOAD, 0, 0, offset), (JUMP_EQUAL, 0, skip, value_)]
        code.append((RETURN, 0, 0, ACTIONS[action]))
    code.append((RETURN, 0, 0, ACTIONS["allow"]))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def install(code: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(SECCOMP, SET_MODE_FILTER, 0, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    dashes = sys.argv.index("--")
    for name in sys.argv[1].split(","):
        install(filter_of(name, sys.argv[2:dashes]))
    os.execvp(sys.argv[dashes + 1], sys.argv[dashes + 1 :])
