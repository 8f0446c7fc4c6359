# SPDX-License-Identifier: GPL-2.0-or-later
"""Parse arguments, print results and report errors in small scripts.

::

    async def main(options: Namespace) -> None:
        async with connect(options.socket) as vm:
            show([f"QEMU {vm.state.version} is {vm.state.status}"])


    if __name__ == "__main__":
        run(main, parser(__doc__))

Such a script reports errors in the same way as the command line. It prints the cause and the remedy
to stderr, and its exit status is a member of :class:`~qemu_prefault.errors.ExitStatus`. The scripts
in ``qmp_scripts/`` are examples.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

from ..text import install_hooks, printable
from .console import Printer, reporting, run_async
from .format import ram_map_lines, report_lines, table

#: The main function of a script: a coroutine function that takes the parsed arguments.
Main = Callable[[Namespace], Coroutine[Any, Any, None]]

__all__ = ["Main", "parser", "ram_map_lines", "report_lines", "run", "show", "table"]


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser(description: str | None) -> ArgumentParser:
    """Return a parser for ``socket`` and ``--debug``, which every script accepts.

    :param description: The text that ``--help`` shows. argparse does not rewrap this text.
    """
    made = _Parser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("socket", help="QEMU's QMP socket, as a path or HOST:PORT")
    made.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return made


def show(lines: Iterable[str]) -> None:
    """Print lines to stdout, and escape control characters except newlines.

    :raises FailedError: If the lines cannot be written (code ``output``).
    """
    single = (part for line in lines for part in line.split("\n"))
    Printer(as_json=False).result({}, single)


def run(main: Main, arguments: ArgumentParser) -> NoReturn:
    """Parse the command line, run ``main``, and exit.

    If ``main`` returns, the exit status is 0. If ``main`` raises an error, the exit status is that
    of the error. Ctrl-C, SIGTERM and SIGHUP cancel ``main``, so that it resumes a paused guest and
    removes helper threads from QEMU.

    :param main: A coroutine function. Its argument contains the script's parsed arguments.
    :param arguments: A parser that :func:`parser` returned. The script may add arguments to it.
    """
    install_hooks()
    options = arguments.parse_args()
    with reporting(False, options.debug, arguments.prog):
        run_async(main(options))
    sys.exit(0)
