# SPDX-License-Identifier: GPL-2.0-or-later
"""Parse and check what the plugin in QEMU sends over its control socket.

QEMU may be hostile, so these functions accept only replies whose length, number of values, nesting,
types and numbers are within limits. For every other reply they raise :class:`.AgentError` (code
``agent``).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from ..errors import AgentError, Code, LayoutError, RefusedError
from ..qemu.qapi import expect_array, expect_bool, expect_int, expect_object, expect_str, quote
from .base import MAX_ERRNO

#: The error code of the reply if another client's batch is running (native/plugin/errors.h).
BUSY: Final = "busy"
#: The error code of the reply if QEMU's limits do not allow a thread for the request.
NO_THREAD: Final = "no-thread"
#: Maximum length of the text about a limit, which contains the path of a cgroup.
MAX_CLAUSE: Final = 1024
#: Maximum length of a reply, in bytes. A reply to ``status`` has about 240 bytes for each memslot,
#: and a reply to a batch of 4096 ranges has at most 120 KiB.
MAX_BYTES: Final = 4 << 20
#: Maximum number of values in a reply. A memslot in the reply to ``status`` has 11 values. Python
#: needs up to 64 bytes for each value.
MAX_VALUES: Final = 1 << 18
#: Maximum depth of arrays and objects in a reply. The plugin uses 3.
MAX_DEPTH: Final = 16
#: Maximum length of an integer in a reply, in digits.
MAX_DIGITS: Final = 40

#: A string, which may lack its end, or a bracket. Without "?", the search would take quadratic
#: time.
_STRING_OR_BRACKET: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]')
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class _RejectedError(ValueError):
    """A reply exceeds a limit. The text is a clause about the reply."""


def parse_answer(line: bytes, pid: int) -> dict[str, Any]:
    """Return the object in one line from the plugin.

    :param line: The line, with or without its line feed.
    :param pid: QEMU's pid, for error messages.
    :raises RefusedError: If the reply is an error with the code ``busy`` or ``no-thread``.
    :raises AgentError: If the reply is another error, is malformed, or exceeds a limit.
    """
    try:
        _check_size(line)
        found = json.loads(
            line.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short_int,
        )
    except _RejectedError as error:
        raise _malformed(pid, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise AgentError(
            f"the plugin in QEMU (pid {pid}) sent a reply that is not JSON", _REMEDY
        ) from error
    with well_formed(pid):
        answer = dict(expect_object(found, "the reply"))
        if "error" not in answer:
            return answer
        text = expect_str(answer["error"], "error")
        code = expect_str(answer.get("code", ""), "code")
    if code == BUSY:
        raise RefusedError(
            f"another qemu-prefault is working in QEMU (pid {pid})",
            "wait until the other qemu-prefault has finished, then run qemu-prefault again",
            code=Code.BUSY_AGENT,
        )
    if code == NO_THREAD:
        raise RefusedError(
            f"the plugin in QEMU (pid {pid}) refused the request: {repr(text[:MAX_CLAUSE])[1:-1]}",
            "raise this limit of QEMU",
            code=Code.NO_TASKS,
        )
    raise AgentError(f"the plugin refused the request: {quote(text)[1:-1]}", "report this error")


def parse_status(answer: dict[str, Any], pid: int) -> dict[str, Any]:
    """Check the fields of a reply to ``status`` that this package uses, and return the reply.

    :raises AgentError: If a field is absent or has another type.
    """
    with well_formed(pid):
        for vcpu in expect_array(answer.get("vcpus"), "vcpus"):
            expect_int(expect_object(vcpu, "an entry of vcpus").get("id"), "id of a vCPU")
        for vcpu in expect_array(answer.setdefault("prefault_vcpus", []), "prefault_vcpus"):
            expect_int(expect_object(vcpu, "an entry of prefault_vcpus").get("id"), "id of a vCPU")
        if answer.setdefault("no_prefault_vcpus", None) is not None:
            expect_str(answer["no_prefault_vcpus"], "no_prefault_vcpus")
        for key in ("keeping", "pre_fault_memory"):
            expect_bool(answer.get(key), key)
        expect_str(answer.get("quirk"), "quirk")
        if answer.get("held") is not None:
            expect_str(answer["held"], "held")
        answer.setdefault("held", None)
        expect_int(answer.get("pending"), "pending")
        counters = expect_object(answer.get("counters"), "counters")
        for key in ("prefaulted", "again", "errors"):
            expect_int(counters.get(key), f"counter {key}")
    return answer


def parse_event(event: dict[str, Any], pid: int) -> dict[str, Any]:
    """Check the fields of an event (docs/reference/events.md), and return the event.

    :raises AgentError: If a field has another type.
    """
    with well_formed(pid):
        expect_str(event.get("event"), "event")
        for key in ("gpa", "size", "bytes", "populated", "pending", "remaining"):
            if key in event:
                expect_int(event[key], f"{key} of an event")
        for key in ("time", "seconds"):
            if key in event:
                _expect_seconds(event[key], f"{key} of an event")
    return event


def parse_progress(answer: dict[str, Any], pid: int) -> int | None:
    """Return the completed bytes of a batch, or None if the reply contains no progress.

    :raises AgentError: If the number is malformed.
    """
    if "progress" not in answer:
        return None
    with well_formed(pid):
        return expect_int(answer["progress"], "progress")


def parse_done(answer: dict[str, Any], count: int, pid: int) -> tuple[list[tuple[int, int]], float]:
    """Return the result of a batch from the reply that ends the batch.

    :param count: The number of ranges in the batch.
    :returns: The completed bytes and the errno of each range, and the duration of the batch in
        seconds.
    :raises AgentError: If the reply is malformed.
    """
    with well_formed(pid):
        entries = expect_array(answer["done"], "done")
        if len(entries) != count:
            raise LayoutError(f"done has {len(entries)} entries for {count} ranges")
        ranges = []
        for item in entries:
            size, error = (*expect_array(item, "an entry of done"), None, None)[:2]
            ranges.append(
                (expect_int(size, "bytes done"), expect_int(error, "an errno", 0, MAX_ERRNO))
            )
        return ranges, _expect_seconds(answer.get("seconds"), "seconds")


@contextlib.contextmanager
def well_formed(pid: int) -> Iterator[None]:
    """Raise the error for a malformed reply if a check in the block fails."""
    try:
        yield
    except LayoutError as error:
        raise _malformed(pid, error.cause) from error


def too_long(pid: int) -> AgentError:
    """Return the error for a reply of more than :data:`MAX_BYTES` bytes."""
    return _malformed(pid, f"it has more than {MAX_BYTES >> 20} MiB")


def sent_descriptors(pid: int) -> AgentError:
    """Return the error for a reply with file descriptors."""
    return _malformed(pid, "it contains file descriptors")


_REMEDY: Final = (
    "check that the plugin is from this release of qemu-prefault (qemu-prefault plugin-path), then "
    "report this error"
)


def _malformed(pid: int, why: str) -> AgentError:
    return AgentError(f"the plugin in QEMU (pid {pid}) sent a malformed reply: {why}", _REMEDY)


def _check_size(line: bytes) -> None:
    """Check a reply's size before Python creates an object for each value."""
    if len(line) > MAX_BYTES:
        raise _RejectedError(f"it has more than {MAX_BYTES >> 20} MiB")
    opened = line.count(b"[") + line.count(b"{")
    if opened + line.count(b",") + line.count(b":") > MAX_VALUES:
        raise _RejectedError(f"it has more than {MAX_VALUES} values")
    if opened > MAX_DEPTH:
        depth = 0
        for match in _STRING_OR_BRACKET.finditer(line):
            if match[0] in (b"[", b"{"):
                depth += 1
                if depth > MAX_DEPTH:
                    raise _RejectedError(f"it has more than {MAX_DEPTH} nested arrays")
            elif match[0] in (b"]", b"}"):
                depth -= 1
    if _SURROGATE.search(line):
        raise _RejectedError("a text contains a surrogate, which is not a character")


def _no_constant(name: str) -> NoReturn:
    raise _RejectedError(f"it contains {name}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RejectedError("a number is too large")
    return value


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _RejectedError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _expect_seconds(value: object, what: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1 << 35:
        return float(value)
    raise LayoutError(f"{what} is not a time")
