# SPDX-License-Identifier: GPL-2.0-or-later
"""What a small script on this API need not write itself: its arguments, and how it ends.

::

    async def main(options: Namespace) -> None:
        async with connect(options.socket) as vm:
            show([f"QEMU {vm.state.version} is {vm.state.status}"])


    if __name__ == "__main__":
        run(main, parser(__doc__))

It ends as the command line does: an error is two lines on stderr, what failed and what to do
now, and :class:`~qemu_prefault.errors.ExitStatus` is the exit status. The scripts in
``qmp_scripts/`` are written so.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

from .console import Printer, reporting, run_async
from .format import ram_map_lines, report_lines, table

Main = Callable[[Namespace], Coroutine[Any, Any, None]]

__all__ = ["Main", "parser", "ram_map_lines", "report_lines", "run", "show", "table"]


def parser(description: str | None) -> ArgumentParser:
    """Make a parser with what all scripts take: ``socket``, and ``--debug`` for tracebacks.

    :param description: shown by ``--help`` as it is written; usually the script's docstring.
    """
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("socket", help="QEMU's QMP socket: a path, or HOST:PORT")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def show(lines: Iterable[str]) -> None:
    """Print to stdout at once, with all but line ends that would steer a terminal escaped.

    :raises FailedError: if it cannot be written (code ``output``).
    """
    single = (part for line in lines for part in line.split("\n"))
    Printer(as_json=False).result({}, single)


def run(main: Main, arguments: ArgumentParser) -> NoReturn:
    """Parse the command line, run ``main`` to its end, and exit.

    The exit status is 0, or that of the error ``main`` raised. Ctrl-C, SIGTERM and SIGHUP
    cancel ``main``, so that what it holds (a paused guest, helpers in QEMU) is let go.
    """
    options = arguments.parse_args()
    with reporting(False, options.debug, arguments.prog):
        run_async(main(options))
    sys.exit(0)
