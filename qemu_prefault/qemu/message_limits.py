# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits on the QMP messages that this process decodes and keeps.

Python needs up to 100 bytes for a value that takes one byte on the wire. Therefore each message is
measured before it is decoded.
"""

from __future__ import annotations

import re
from typing import Final

#: Maximum size in bytes, and maximum number of values, of a reply, and of all replies to concurrent
#: commands together. The reply to ``info mtree -f`` stays below 1 MiB for a guest with hundreds of
#: vCPUs and devices. The reply to ``query-cpus-fast`` has about 20 values per vCPU.
MAX_REPLY: Final = 4 << 20
MAX_VALUES: Final = 1 << 17
#: Maximum size in bytes, and maximum number of values, of an event. Longer events are ignored.
MAX_EVENT: Final = 4 << 10
MAX_EVENT_VALUES: Final = 64

#: A string, which may lack its end, or a mark. Without "?", the search would take quadratic time.
_STRING_OR_MARK: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{,:]')


class TooLargeError(Exception):
    """The replies to the pending commands exceed a limit. The text is a clause about them."""


def count_values(message: bytes) -> int:
    """Return an upper bound on the number of values in a JSON message.

    The function stops counting after :data:`MAX_VALUES`.
    """
    count = 1 + sum(message.count(mark) for mark in (b"[", b"{", b",", b":"))
    if count <= MAX_EVENT_VALUES:
        return count
    # Do not count the marks in strings. "info mtree" is one string with many of them.
    count = 1
    for match in _STRING_OR_MARK.finditer(message):
        count += match[0][:1] != b'"'
        if count > MAX_VALUES:
            break
    return count


class ReplyBudget:
    """What the replies to the pending commands may still use."""

    def __init__(self) -> None:
        self._pending = 0
        self._bytes = 0
        self._values = 0

    def __enter__(self) -> None:
        """Count one pending command within the ``with`` block."""
        if not self._pending:
            self._bytes = self._values = 0
        self._pending += 1

    def __exit__(self, *_: object) -> None:
        self._pending -= 1

    def spend(self, message: bytes, values: int) -> None:
        """Count a message.

        :raises TooLargeError: If the messages since the first pending command exceed a limit.
        """
        self._bytes += len(message)
        self._values += values
        if self._bytes > MAX_REPLY:
            raise TooLargeError(f"replies of more than {MAX_REPLY >> 20} MiB")
        if self._values > MAX_VALUES:
            raise TooLargeError(f"replies with more than {MAX_VALUES} values")
