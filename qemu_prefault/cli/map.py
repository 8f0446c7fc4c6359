# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault map`` command, which shows the guest's RAM."""

from __future__ import annotations

import click

import qemu_prefault

from .console import Printer, reporting, run_async
from .format import ram_map_lines
from .options import (
    connect,
    debug_option,
    domain_option,
    json_option,
    pid_option,
    qmp_option,
    required_address,
)


@click.command("map")
@qmp_option
@domain_option
@pid_option
@json_option
@debug_option
def map_(qmp: str | None, domain: str | None, pid: int | None, as_json: bool, debug: bool) -> None:
    """Show the addresses, the backing and the resident memory of the guest's RAM."""
    address = required_address(qmp, domain)

    async def main() -> None:
        async with connect(address, pid) as vm:
            found = await qemu_prefault.ram_map(vm)
        Printer(as_json).result(found.to_json(), ram_map_lines(found))

    with reporting(as_json, debug):
        run_async(main())
