# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault run`` command, which starts QEMU with the plugin."""

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
    help="Plugin option: populate=auto|all|resident, vcpu=auto|prefault|borrow, "
    "start=wait|background, rate=BYTES_PER_SECOND, quirk=disable|keep, "
    "hold=SECONDS, socket=/PATH|~/PATH|off, keep=on|off, log=on|off. "
    "This option can be repeated.",
)
@debug_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(options: tuple[str, ...], command: tuple[str, ...], debug: bool) -> None:
    """Start QEMU with the plugin.

    The plugin prefaults the guest before its first instruction, and keeps it prefaulted.

    COMMAND is QEMU's command line. qemu-prefault does not change it, because LD_PRELOAD loads the
    plugin. QEMU replaces this process. Therefore signals reach QEMU, and the exit status is QEMU's.
    """
    with reporting(False, debug):
        qemu_prefault.replace_by(
            command, options, warn=lambda text: say(f"{PROGRAM}: warning: {text}")
        )
