# SPDX-License-Identifier: GPL-2.0-or-later
"""Write text to terminals and logs, and escape what could control them.

Names, paths, error messages and replies can come from QEMU, libvirt or another user. Such text must
not move a terminal's cursor, reverse the order of characters, add a line to a log, or change the
priority of a line in the journal. Therefore every function of this package that prints or logs
text calls a function of this module (tests/unit/test_text.py).
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, TextIO

#: Maximum length of a line in a log, in characters. journald splits lines of more than 48 KiB, and
#: reads a priority at the start of each part (LineMax= in journald.conf(5)).
LONGEST_LOG_LINE: Final = 2048
#: Maximum number of exceptions in a chain whose tracebacks are printed.
_LONGEST_CHAIN: Final = 20

#: A priority such as ``<4>``. journald and systemd accept one to three digits (sd-daemon(3),
#: syslog_parse_priority() in src/shared/syslog-util.c).
_PRIORITY: Final = re.compile(r"<(?=[0-9]{1,3}>)")


def printable(text: str) -> str:
    r"""Escape the characters that could control a terminal or a log.

    These are control characters, line separators, invisible format characters such as bidirectional
    overrides, and surrogates. The function also escapes ``<`` in ``<4>``, which would be a priority
    at the start of a line.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _PRIORITY.sub(r"\\x3c", text)


def log_text(text: str) -> str:
    """Return the printable text, cut to the maximum length of a log line."""
    safe = printable(text[: LONGEST_LOG_LINE + 1])
    return safe if len(safe) <= LONGEST_LOG_LINE else f"{safe[: LONGEST_LOG_LINE - 1]}…"


def json_text(data: object) -> str:
    """Return JSON in one line of ASCII that contains no priority such as ``<4>``."""
    return _PRIORITY.sub(r"\\u003c", json.dumps(data))


def write(text: str, stream: TextIO | None, *, before: str = "", after: str = "\n") -> None:
    """Write printable text to a stream, and flush the stream.

    If the stream is None, because its descriptor was closed when Python started, the function does
    nothing.

    :param before: Text of this package, such as a priority, which is not escaped.
    :param after: Like ``before``.
    :raises OSError: If the stream cannot be written.
    """
    if stream is not None:
        stream.write(f"{before}{printable(text)}{after}")
        stream.flush()


def write_json(data: object, stream: TextIO | None) -> None:
    """Write a JSON object as one line to a stream, like :func:`write`."""
    if stream is not None:
        stream.write(f"{json_text(data)}\n")
        stream.flush()


def error_lines(error: BaseException) -> Iterator[str]:
    """Yield the lines of the traceback of an exception and of its causes.

    Unlike :func:`traceback.format_exception`, the function never splits an exception's text into
    several lines.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain and len(chain) < _LONGEST_CHAIN:
        chain.append(following)
        suppressed = following.__suppress_context__
        following = following.__cause__ or (None if suppressed else following.__context__)
    for found in reversed(chain):
        yield "Traceback (most recent call last):"
        for frame in traceback.format_tb(found.__traceback__):
            yield from frame.splitlines()
        try:
            yield f"{type(found).__name__}: {found}"
        except Exception:
            yield f"{type(found).__name__}"
        if isinstance(found, BaseExceptionGroup):
            for inner in found.exceptions[:_LONGEST_CHAIN]:
                yield from error_lines(inner)


def print_error(error: BaseException) -> None:
    """Print the traceback of an exception to stderr."""
    try:
        for line in error_lines(error):
            write(line, sys.stderr)
    except (OSError, ValueError):  # stderr is closed
        pass


def install_hooks() -> None:
    """Make Python print the tracebacks of uncaught exceptions with :func:`print_error`."""
    import threading  # noqa: PLC0415

    def uncaught(
        _kind: type[BaseException], error: BaseException, _traceback: TracebackType | None
    ) -> None:
        print_error(error)

    def in_thread(args: Any) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            print_error(args.exc_value)

    def unraisable(args: Any) -> None:
        if args.exc_value is not None:
            print_error(args.exc_value)

    sys.excepthook = uncaught
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable
