# SPDX-License-Identifier: GPL-2.0-or-later
"""Print the results of a command to stdout, and other messages to stderr."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any, Final, NoReturn

import click

from ..errors import REMEDY_OPEN_FILES, Code, ExitStatus, FailedError, QemuPrefaultError
from ..text import install_hooks, write, write_json
from ..units import format_size
from .format import error_json

PROGRAM = "qemu-prefault"
#: Moves the cursor to the start of the line, and clears the line (ECMA-48).
CLEAR_LINE: Final = "\r\x1b[K"


def say(text: str) -> None:
    """Print a line to stderr, and ignore the error if stderr is closed."""
    with contextlib.suppress(OSError):
        write(text, sys.stderr)


def drop_stdout() -> None:
    """Redirect stdout to /dev/null, so that Python can flush it at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@atexit.register
def _drop_unwritable_stderr() -> None:
    """Redirect stderr to /dev/null if it cannot be flushed.

    Without this redirection, Python 3.11.2 exits with status 120.
    """
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Printer:
    """Prints results to stdout, and progress to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._phase = ""
        self._started = self._shown = 0.0
        self._base = 0
        self._live = sys.stderr is not None and sys.stderr.isatty()

    def result(self, data: dict[str, Any], text: Iterator[str]) -> None:
        try:
            if self.as_json:
                write_json(data, sys.stdout)
                return
            for line in text:
                write(line, sys.stdout)
        except BrokenPipeError:
            raise
        except OSError as error:
            drop_stdout()
            raise FailedError(
                f"the result could not be written: {error.strerror}",
                "check that stdout is writable, for example that its disk is not full. If this "
                "command was a prefault, it has completed. To see its effect, run: "
                "qemu-prefault stats",
                code=Code.OUTPUT,
            ) from error

    def progress(self, phase: str, done: int, total: int) -> None:
        """Print the completed bytes, the rate in GiB/s and the remaining time.

        If stderr is a terminal, print at most once per 0.1 seconds. Otherwise print at most once
        per second.
        """
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started, self._base = phase, now, done
            self._shown = now  # the rate is not known yet
        if now - self._shown < (0.1 if self._live else 1.0):
            return
        self._shown = now
        rate = (done - self._base) / max(now - self._started, 1e-9)
        eta = f", {(total - done) / rate:.0f} s left" if rate and total > done else ""
        amount = f"{format_size(done)} of {format_size(total)}"
        line = f"{phase}: {amount}, {rate / (1 << 30):.2f} GiB/s{eta}"
        with contextlib.suppress(OSError):
            if self._live:
                write(line, sys.stderr, before=CLEAR_LINE, after="")
            else:
                write(line, sys.stderr)

    async def ready(self) -> None:
        say("qemu-prefault: ready for the incoming guest")

    def end_progress(self) -> None:
        if self._live and self._shown:
            with contextlib.suppress(OSError):
                write("", sys.stderr, before=CLEAR_LINE, after="")


def fail(error: QemuPrefaultError, as_json: bool, program: str = PROGRAM) -> NoReturn:
    """Print the cause and the remedy of an error, and exit with its exit status."""
    if as_json:
        try:
            write_json(error_json(error), sys.stdout)
        except OSError:
            drop_stdout()
    say(f"{program}: {error.cause}")
    for line in error.remedy.splitlines():
        say(f"  {line}")
    sys.exit(int(error.exit_status))


@contextlib.contextmanager
def reporting(as_json: bool, debug: bool, program: str = PROGRAM) -> Iterator[None]:
    """Print the cause and the remedy of an exception that the block raises, and exit.

    If ``debug`` is set, print the traceback instead.
    """
    from ..logs import escape_unhandled_records  # noqa: PLC0415

    install_hooks()
    escape_unhandled_records()
    try:
        yield
    except QemuPrefaultError as error:
        if debug:
            raise
        fail(error, as_json, program)
    except (click.exceptions.Exit, click.ClickException, click.Abort):
        raise
    except BrokenPipeError:
        drop_stdout()
        sys.exit(int(ExitStatus.FAILED))
    except Exception as error:
        if debug:
            raise
        fail(_shortage(error) or _bug(error), as_json, program)


def _bug(error: Exception) -> QemuPrefaultError:
    return QemuPrefaultError(
        f"internal error: {type(error).__name__}: {error}",
        "run the command again with --debug, and report the output as a bug",
        code=Code.BUG,
    )


def _shortage(error: BaseException | None) -> FailedError | None:
    """Return the error for a limit of this process that an exception or its context shows."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.EMFILE, errno.ENFILE):
            return FailedError(f"qemu-prefault cannot open a file: {error}", REMEDY_OPEN_FILES)
        # threading.Thread.start() raises this RuntimeError without an errno.
        if number == errno.EAGAIN or str(error) == "can't start new thread":
            return FailedError(
                "qemu-prefault cannot start another thread or process",
                "raise the limit on the tasks of qemu-prefault (ulimit -u, or pids.max of its "
                "cgroup)",
            )
        if number == errno.ENOMEM or isinstance(error, MemoryError):
            return FailedError(
                "qemu-prefault has no memory left",
                "free memory, or raise qemu-prefault's limits (ulimit -v, or its memory cgroup)",
            )
        error = error.__context__
    return None


def print_warnings() -> None:
    """Print each warning that this package logs."""
    import logging  # noqa: PLC0415

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{PROGRAM}: {record.getMessage()}")

    log = logging.getLogger("qemu_prefault")
    if not log.handlers:
        log.addHandler(Handler(logging.WARNING))


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine, and cancel it on SIGTERM, SIGHUP or Ctrl-C.

    A stopped tool cannot resume the guest, or a thread of QEMU that it traces. Therefore ignore the
    signals with which a terminal stops a process: Ctrl-Z, and ``stty tostop``.
    """
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    async def guarded() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        await main

    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    print_warnings()
    try:
        asyncio.run(guarded())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise QemuPrefaultError(
            "a signal interrupted the run",
            "the guest's run state is the same as before the run",
            code=Code.INTERRUPTED,
        ) from None
