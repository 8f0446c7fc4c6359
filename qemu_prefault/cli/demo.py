# SPDX-License-Identifier: GPL-2.0-or-later
"""``qemu-prefault demo``, which the lab runs."""

from __future__ import annotations

import click

from ..errors import Code, UnsupportedError
from .console import reporting
from .options import debug_option, json_option


@click.command()
@json_option
@debug_option
def demo(as_json: bool, debug: bool) -> None:
    """Show the whole story on any x86-64 Linux: a restored guest, and a booting one."""
    with reporting(as_json, debug):
        try:
            from qemu_prefault_lab.demo import run_demo  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if error.name != "qemu_prefault_lab":
                raise
            raise UnsupportedError(
                "the demo needs qemu-prefault-lab, which is not installed",
                "in a checkout of qemu-prefault, install it: pip install ./lab\n"
                "or install nothing and run the demo from there: make demo",
                code=Code.NO_LAB,
            ) from None
        run_demo(as_json)
