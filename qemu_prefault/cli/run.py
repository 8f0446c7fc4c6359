# SPDX-License-Identifier: GPL-2.0-or-later
"""``qemu-prefault run``: start QEMU with the plugin."""

from __future__ import annotations

import click

import qemu_prefault

from .console import PROGRAM, reporting, say
from .options import debug_option


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-o",
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the plugin: populate=auto|all|resident, quirk=disable|keep, "
    "hold=SECONDS, socket=/PATH|~/PATH|off, keep=on|off, log=on|off. May be repeated.",
)
@debug_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(options: tuple[str, ...], command: tuple[str, ...], debug: bool) -> None:
    """Start QEMU with the plugin: prefaulted before the first instruction, and kept so.

    COMMAND is QEMU's command line, which stays as it is: the plugin is loaded by LD_PRELOAD,
    and QEMU takes this process's place, so signals and exit status are its own.
    """
    with reporting(False, debug):
        qemu_prefault.replace_by(
            command, options, warn=lambda text: say(f"{PROGRAM}: warning: {text}")
        )
