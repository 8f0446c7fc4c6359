# SPDX-License-Identifier: GPL-2.0-or-later
"""The only module that prints: results to stdout, the rest to stderr, errors as exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any, NoReturn

import click

from ..errors import Code, ExitStatus, FailedError, QemuPrefaultError
from ..units import format_size, printable
from .format import error_json

PROGRAM = "qemu-prefault"


def say(text: str) -> None:
    """A line to stderr; that nobody reads it changes nothing."""
    with contextlib.suppress(OSError):
        click.echo(printable(text), err=True)


def drop_stdout() -> None:
    """Nobody reads it, or its disk is full: the interpreter need not try again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Printer:
    """Results to stdout, everything else to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._phase = ""
        self._started = self._shown = 0.0
        self._base = 0
        self._live = sys.stderr is not None and sys.stderr.isatty()

    def result(self, data: dict[str, Any], text: Iterator[str]) -> None:
        try:
            for line in [json.dumps(data)] if self.as_json else map(printable, text):
                click.echo(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            drop_stdout()
            raise FailedError(
                f"the result could not be written: {error.strerror}",
                "what was to be done is done; `qemu-prefault stats` shows it",
                code=Code.OUTPUT,
            ) from error

    def progress(self, phase: str, done: int, total: int) -> None:
        """Bytes, GiB/s and time to go; once a second where stderr is no terminal."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started, self._base = phase, now, done
            self._shown = now  # there is no rate yet
        if now - self._shown < (0.1 if self._live else 1.0):
            return
        self._shown = now
        rate = (done - self._base) / max(now - self._started, 1e-9)
        eta = f", {(total - done) / rate:.0f} s to go" if rate and total > done else ""
        amount = f"{format_size(done)} of {format_size(total)}"
        line = f"{phase}: {amount}, {rate / (1 << 30):.2f} GiB/s{eta}"
        with contextlib.suppress(OSError):
            click.echo(f"\r\x1b[K{line}" if self._live else line, err=True, nl=not self._live)

    async def ready(self) -> None:
        say("qemu-prefault: ready: the guest may come")

    def end_progress(self) -> None:
        if self._live and self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def fail(error: QemuPrefaultError, as_json: bool, program: str = PROGRAM) -> NoReturn:
    """Say what happened and what to do; end with the error's exit status."""
    if as_json:
        try:
            click.echo(json.dumps(error_json(error)))
        except OSError:
            drop_stdout()
    say(f"{program}: {error.cause}")
    for line in error.remedy.splitlines():
        say(f"  {line}")
    sys.exit(int(error.exit_status))


@contextlib.contextmanager
def reporting(as_json: bool, debug: bool, program: str = PROGRAM) -> Iterator[None]:
    """No traceback reaches a user, unless asked for with --debug."""
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
        fail(
            QemuPrefaultError(
                f"internal error: {type(error).__name__}: {error}",
                "this is a bug; please report it with the output of --debug",
                code=Code.BUG,
            ),
            as_json,
            program,
        )


def print_warnings() -> None:
    """Print what the package logs while it works, at once."""
    import logging  # noqa: PLC0415

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{PROGRAM}: {record.getMessage()}")

    log = logging.getLogger("qemu_prefault")
    if not log.handlers:
        log.addHandler(Handler(logging.WARNING))


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; SIGTERM and SIGHUP end it as cleanly as Ctrl-C does."""
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    async def guarded() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        await main

    print_warnings()
    try:
        asyncio.run(guarded())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise QemuPrefaultError(
            "interrupted", "the guest's run state is as it was found", code=Code.INTERRUPTED
        ) from None
