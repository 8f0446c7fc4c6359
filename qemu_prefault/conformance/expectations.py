# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks that the cases use.

A failed check raises :class:`Unexpected`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..host.kvm import EHWPOISON

_NAMES = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN", EHWPOISON: "EHWPOISON"}


class Unexpected(Exception):
    """The kernel or the guest did not behave as the case states."""


def error_name(number: int) -> str:
    """Return the name of an errno, or "success" for 0.

    On Linux, ``errno.errorcode`` maps the number of EOPNOTSUPP to the synonym ENOTSUP. Some Python
    versions do not define EHWPOISON.
    """
    if number in _NAMES:
        return _NAMES[number]
    return errno.errorcode.get(number, str(number)) if number else "success"


def expect(condition: object, text: str) -> None:
    """Raise :class:`Unexpected` with ``text`` if the condition is false."""
    if not condition:
        raise Unexpected(text)


def expect_equal(seen: object, wanted: object, what: str) -> None:
    """Raise :class:`Unexpected` if the two values differ.

    :param what: The name of the value. The message begins with this name.
    """
    if seen != wanted:
        raise Unexpected(f"{what}: got {seen}, expected {wanted}")


def fails_with(call: Callable[[], object]) -> int:
    """Return the errno with which a call fails, or 0 if the call succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0
