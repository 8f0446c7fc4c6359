# SPDX-License-Identifier: GPL-2.0-or-later
"""Helpers for small scripts on the public API: arguments, output and exit status.

::

    async def main(options: Namespace) -> None:
        async with connect(options.socket) as vm:
            show([f"QEMU {vm.state.version} is {vm.state.status}"])


    if __name__ == "__main__":
        run(main, parser(__doc__))

Such a script reports errors as the command line does: the cause and the remedy go to stderr,
and the exit status is one of :class:`~qemu_prefault.errors.ExitStatus`. The scripts in
``qmp_scripts/`` are examples.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

from .console import Printer, reporting, run_async
from .format import ram_map_lines, report_lines, table

#: The main function of a script: a coroutine function that takes the parsed arguments.
Main = Callable[[Namespace], Coroutine[Any, Any, None]]

__all__ = ["Main", "parser", "ram_map_lines", "report_lines", "run", "show", "table"]


def parser(description: str | None) -> ArgumentParser:
    """Return a parser with the arguments of all scripts: ``socket`` and ``--debug``.

    :param description: The text that ``--help`` shows unchanged, usually the script's docstring.
    """
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("socket", help="QMP socket of QEMU: a path, or HOST:PORT")
    made.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return made


def show(lines: Iterable[str]) -> None:
    """Print lines to stdout and flush. Escape control characters other than newlines.

    :raises FailedError: The lines cannot be written (code ``output``).
    """
    single = (part for line in lines for part in line.split("\n"))
    Printer(as_json=False).result({}, single)


def run(main: Main, arguments: ArgumentParser) -> NoReturn:
    """Parse the command line, run ``main``, and exit.

    The exit status is 0 if ``main`` returns, or the exit status of the error that it raises.
    Ctrl-C, SIGTERM and SIGHUP cancel ``main``, so that it resumes a paused guest and removes
    helper threads from QEMU.

    :param main: The coroutine function of the script. Its argument holds the parsed arguments.
    :param arguments: A parser from :func:`parser`, to which the script may add arguments.
    """
    options = arguments.parse_args()
    with reporting(False, options.debug, arguments.prog):
        run_async(main(options))
    sys.exit(0)
