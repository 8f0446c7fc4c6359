# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault demo`` command, which runs the lab's demo."""

from __future__ import annotations

import sys

import click

from ..errors import Code, UnsupportedError
from .console import reporting
from .options import debug_option, json_option


@click.command()
@click.option("--ept", is_flag=True, help="Run on an Intel CPU with EPT, which Bochs emulates.")
@json_option
@debug_option
def demo(ept: bool, as_json: bool, debug: bool) -> None:
    """Show the effect of prefaulting on a restored guest and on a booting guest.

    The demo runs on any x86-64 Linux host. It does not need hardware virtualization.
    """
    with reporting(as_json, debug):
        try:
            from qemu_prefault_lab.demo import run_demo  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if error.name != "qemu_prefault_lab":
                raise
            raise UnsupportedError(
                "the demo needs qemu-prefault-lab, which is not installed",
                "to install it, run this command in a checkout of qemu-prefault: "
                f"{sys.executable} -m pip install ./lab\n"
                "to run the demo in a checkout without installing anything, run: make demo",
                code=Code.NO_LAB,
            ) from None
        run_demo(as_json, ept=ept)
