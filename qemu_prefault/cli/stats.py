# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault stats`` command, which shows KVM's counters."""

from __future__ import annotations

import contextlib

import click

import qemu_prefault

from .console import Printer, reporting, run_async
from .format import counters_header, counters_line
from .options import (
    connect_monitor,
    debug_option,
    domain_option,
    json_option,
    qmp_option,
    required_address,
)


@click.command()
@qmp_option
@domain_option
@click.option("--watch", is_flag=True, help="Print a line per interval until Ctrl-C is pressed.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05),
    default=1.0,
    show_default=True,
    help="Interval of --watch, in seconds.",
)
@json_option
@debug_option
def stats(  # noqa: PLR0917
    qmp: str | None,
    domain: str | None,
    watch: bool,
    interval: float,
    as_json: bool,
    debug: bool,
) -> None:
    """Show KVM's counters of stage-2 leaf entries and of guest faults."""
    address = required_address(qmp, domain)

    async def main() -> None:
        import asyncio  # noqa: PLC0415

        async with connect_monitor(address) as monitor:
            if not as_json:
                Printer(False).result({}, iter([counters_header()]))
            while True:
                now = await qemu_prefault.counters(monitor)
                Printer(as_json).result(now.to_json(), counters_line(now))
                if not watch:
                    return
                await asyncio.sleep(interval)

    with reporting(as_json, debug), contextlib.suppress(KeyboardInterrupt):
        run_async(main())
