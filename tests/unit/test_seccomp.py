# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the evaluation of seccomp filters."""

from __future__ import annotations

import random
import struct

import pytest

from qemu_prefault.agents.helper_calls import TIMERS, has_sandbox, optional_calls, required_calls
from qemu_prefault.agents.seccomp import (
    BadFilterError,
    Call,
    Instruction,
    Number,
    denied,
    parse_filters,
    run_filter,
)
from support.under_filter import ACTIONS, filter_of

ALLOW, KILL = ACTIONS["allow"], ACTIONS["kill"]
LOG, TRAP, ERRNO = ACTIONS["log"], ACTIONS["trap"], ACTIONS["errno"]
USER_NOTIF, TRACE, KILL_THREAD = 0x7FC00000, 0x7FF00000, 0
DATA = Call(Number.ioctl, (1, 0xFEDCBA9876543210, 3), 0x1122334455667788).data()


def always(action: int) -> list[Instruction]:
    return [Instruction(0x06, 0, 0, action)]


def parsed(action: str, *calls: str) -> list[Instruction]:
    code = filter_of(action, list(calls))
    return parse_filters(struct.pack("<I", len(code) // 8) + code)[0]


def result(*code: tuple[int, int, int, int]) -> int:
    """Return the value of the accumulator after these instructions."""
    return run_filter([*(Instruction(*i) for i in code), Instruction(0x16, 0, 0, 0)], DATA)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ([(0x20, 0, 0, 0)], 16),  # number
        ([(0x20, 0, 0, 4)], 0xC000003E),  # architecture
        ([(0x20, 0, 0, 8)], 0x55667788),  # instruction pointer
        ([(0x20, 0, 0, 12)], 0x11223344),
        ([(0x20, 0, 0, 24)], 0x76543210),  # second argument
        ([(0x20, 0, 0, 28)], 0xFEDCBA98),
        ([(0x80, 0, 0, 0)], 64),  # length
        ([(0x00, 0, 0, 7)], 7),
        ([(0x00, 0, 0, 7), (0x04, 0, 0, 0xFFFFFFFF)], 6),
        ([(0x00, 0, 0, 7), (0x14, 0, 0, 8)], 0xFFFFFFFF),
        ([(0x00, 0, 0, 0x10000), (0x24, 0, 0, 0x10001)], 0x10000),
        ([(0x00, 0, 0, 7), (0x34, 0, 0, 2)], 3),
        ([(0x00, 0, 0, 6), (0x44, 0, 0, 9)], 15),
        ([(0x00, 0, 0, 6), (0x54, 0, 0, 12)], 4),
        ([(0x00, 0, 0, 3), (0x64, 0, 0, 31)], 0x80000000),
        ([(0x00, 0, 0, 8), (0x74, 0, 0, 2)], 2),
        ([(0x00, 0, 0, 1), (0x84, 0, 0, 0)], 0xFFFFFFFF),
        ([(0x00, 0, 0, 6), (0xA4, 0, 0, 3)], 5),
        ([(0x00, 0, 0, 5), (0x07, 0, 0, 0), (0x0C, 0, 0, 0)], 10),  # A + X
        ([(0x01, 0, 0, 9), (0x87, 0, 0, 0)], 9),  # X to A
        ([(0x00, 0, 0, 5), (0x02, 0, 0, 3), (0x00, 0, 0, 0), (0x60, 0, 0, 3)], 5),
        ([(0x01, 0, 0, 5), (0x03, 0, 0, 15), (0x60, 0, 0, 15)], 5),
        ([(0x00, 0, 0, 5), (0x05, 0, 0, 1), (0x00, 0, 0, 6)], 5),  # jump
        ([(0x00, 0, 0, 5), (0x15, 1, 0, 5), (0x00, 0, 0, 6)], 5),
        ([(0x00, 0, 0, 5), (0x15, 1, 0, 4), (0x00, 0, 0, 6)], 6),
        ([(0x00, 0, 0, 5), (0x25, 1, 0, 5), (0x00, 0, 0, 6)], 6),
        ([(0x00, 0, 0, 5), (0x35, 1, 0, 5), (0x00, 0, 0, 6)], 5),
        ([(0x00, 0, 0, 5), (0x45, 1, 0, 2), (0x00, 0, 0, 6)], 6),
    ],
)
def test_instruction(code: list[tuple[int, int, int, int]], expected: int) -> None:
    assert result(*code) == expected


@pytest.mark.parametrize(
    "code",
    [
        [],
        [(0x05, 0, 0, 5)],  # jumps out of the program
        [(0x20, 0, 0, 64), (0x16, 0, 0, 0)],
        [(0x20, 0, 0, 2), (0x16, 0, 0, 0)],
        [(0x60, 0, 0, 16), (0x16, 0, 0, 0)],
        [(0x02, 0, 0, 16), (0x16, 0, 0, 0)],
        [(0x34, 0, 0, 0), (0x16, 0, 0, 0)],  # division by zero
        [(0x94, 0, 0, 2), (0x16, 0, 0, 0)],  # BPF_MOD is not allowed in seccomp filters
    ],
)
def test_bad_filter_denies(code: list[tuple[int, int, int, int]]) -> None:
    program = [Instruction(*i) for i in code]
    with pytest.raises(BadFilterError):
        run_filter(program, DATA)
    assert denied([program], [Call(Number.ioctl)]) == ("ioctl",)


@pytest.mark.parametrize("action", [KILL, KILL_THREAD, TRAP, ERRNO, USER_NOTIF, TRACE, 0x12340000])
def test_other_actions_deny(action: int) -> None:
    for filters in (
        [always(action)],
        [always(ALLOW), always(action)],
        [always(action), always(LOG)],
    ):
        assert denied(filters, [Call(Number.kill)]) == ("kill",)


def test_allow_and_log() -> None:
    assert denied([always(ALLOW), always(LOG)], [Call(Number.kill)]) == ()
    assert denied([], [Call(Number.kill)]) == ()


def test_arguments_matter() -> None:
    program = parsed("kill", "16:1=0xc040aed5", "28:2=23", "62")
    calls = required_calls([5], area=0x1000_0000_0000, gadget=0x7000_0000_0000)
    assert denied([program], calls) == ("madvise", "ioctl")
    assert denied([program], required_calls([-1], area=1 << 44, gadget=0)) == ("madvise",)
    assert denied([program], optional_calls(area=1 << 44)) == ("kill",)
    timers = parsed("kill", "222", "223", "226")
    assert set(denied([timers], optional_calls(area=1 << 44))) == TIMERS


def test_memory_deny_write_execute() -> None:
    """Evaluate the filter of systemd's MemoryDenyWriteExecute=.

    The filter denies mprotect() with PROT_EXEC, and mmap() with both PROT_WRITE and PROT_EXEC.
    """
    calls = required_calls([], area=1 << 44, gadget=0)
    assert denied([parsed("kill", "10", "9:2=6", "9:2=7")], calls) == ()
    assert denied([parsed("kill", "9:2=5")], calls) == ("mmap",)


def test_truncated_filters_are_refused() -> None:
    code = filter_of("kill", ["62"])
    whole = struct.pack("<I", len(code) // 8) + code
    assert len(parse_filters(whole * 3)) == 3
    for size in (1, 3, 5, len(whole) - 1):
        with pytest.raises(BadFilterError):
            parse_filters(whole[:size])


def test_random_programs() -> None:
    """Check that a random program returns a value or raises BadFilterError."""
    chance = random.Random(17)
    for _ in range(5000):
        program = [
            Instruction(chance.choice((0x06, 0x15, 0x20, 0x54, chance.randrange(1 << 16))),
                        chance.randrange(8), chance.randrange(8), chance.randrange(70))
            for _ in range(chance.randrange(12))
        ]  # fmt: skip
        assert denied([program], [Call(Number.ioctl)]) in ((), ("ioctl",))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("qemu", "-sandbox", "on"), True),
        (("qemu", "-sandbox", "on,spawn=deny"), True),
        (("qemu", "--sandbox", "enable=on"), True),
        (("qemu", "-sandbox", "off"), False),
        (("qemu", "-name", "on", "-sandbox"), False),
        (("qemu",), False),
    ],
)
def test_has_sandbox(arguments: tuple[str, ...], expected: bool) -> None:
    assert has_sandbox(arguments) is expected
