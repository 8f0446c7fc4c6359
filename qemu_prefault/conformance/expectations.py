# SPDX-License-Identifier: GPL-2.0-or-later
"""What a case expects: it says so with these, and what was seen instead."""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..host.kvm import EHWPOISON

_NAMES = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN", EHWPOISON: "EHWPOISON"}


class Unexpected(Exception):
    """The kernel, or the guest, did not behave as the case says."""


def error_name(number: int) -> str:
    """Its usual name; Python's own table has other ones for some."""
    if number in _NAMES:
        return _NAMES[number]
    return errno.errorcode.get(number, str(number)) if number else "success"


def expect(condition: object, text: str) -> None:
    """Like ``assert``, but it cannot be switched off, and says what was seen."""
    if not condition:
        raise Unexpected(text)


def expect_equal(seen: object, wanted: object, what: str) -> None:
    if seen != wanted:
        raise Unexpected(f"{what}: {seen}, and not {wanted}")


def fails_with(call: Callable[[], object]) -> int:
    """The errno a call ends with, 0 if it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0
