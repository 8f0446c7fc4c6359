# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault plugin-path`` command, which prints the plugin's path."""

from __future__ import annotations

import click

import qemu_prefault

from .console import Printer, reporting
from .options import debug_option


@click.command("plugin-path")
@debug_option
def plugin_path(debug: bool) -> None:
    """Print the path of the plugin, for QEMU's -plugin option."""
    with reporting(False, debug):
        Printer(False).result({}, iter([str(qemu_prefault.plugin_path())]))
