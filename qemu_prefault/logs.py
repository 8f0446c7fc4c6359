# SPDX-License-Identifier: GPL-2.0-or-later
"""Write log records as lines of printable text."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Final

from .text import error_lines, log_text, write

#: The priorities of sd-daemon(3), by level. The priority of other levels is 6 (info).
_PRIORITIES: Final = {logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class LineHandler(logging.Handler):
    """Writes each log record to stderr as a line, and a traceback as further lines.

    :param level: The lowest level of the records that the handler writes.
    :param before: A function that returns the start of each line, such as a priority.
    """

    def __init__(
        self, level: int = logging.NOTSET, before: Callable[[int], str] = lambda level: ""
    ) -> None:
        super().__init__(level)
        self._before = before

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. A record that cannot be written is lost."""
        try:
            lines = [record.getMessage()]
            if record.exc_info and record.exc_info[1] is not None:
                lines += error_lines(record.exc_info[1])
            for line in lines:
                write(log_text(line), sys.stderr, before=self._before(record.levelno))
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing. The method of the base class prints the record's arguments."""


def line_start(level: int) -> str:
    """Return the start of a line in a daemon's log.

    If stderr is connected to the journal, the start is the priority (sd-daemon(3)). Otherwise it is
    the time.
    """
    if "JOURNAL_STREAM" in os.environ:
        return f"<{_PRIORITIES.get(level, 6)}>"
    return time.strftime("%H:%M:%S ")


def escape_unhandled_records() -> None:
    """Make Python write the warnings of loggers without a handler as printable text."""
    logging.lastResort = LineHandler(logging.WARNING)
