# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault`` command and its subcommands.

Each subcommand is in its own module. :mod:`qemu_prefault` loads the API on first use, so that
``--help`` and completion are fast.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from .. import __version__
from ..errors import ExitStatus, InputError
from ..text import install_hooks, printable
from .conformance import conformance
from .console import drop_stdout, fail, say
from .demo import demo
from .libvirt import libvirt
from .map import map_
from .plugin_path import plugin_path
from .prefault import prefault, prefault_options
from .probe import probe
from .run import run
from .stats import stats

EPILOG = """\b
Examples:
  qemu-prefault --qmp /run/vm.qmp                prefault all RAM of a running guest
  qemu-prefault --qmp /run/vm.qmp --cont         prefault a restored guest and start it
  qemu-prefault --qmp /run/vm.qmp --dry-run      show what a run would do
  qemu-prefault probe --qmp /run/vm.qmp          check what works on this host
  qemu-prefault run -- qemu-system-x86_64 …      start QEMU with the plugin

\b
Exit status:
  0 every requested byte verified    3 partial
  1 failed                           4 not supported by host, kernel or QEMU
  2 usage error                      5 refused, to protect guest or host

\b
Shell completion (for other shells: zsh_source, fish_source):
  eval "$(_QEMU_PREFAULT_COMPLETE=bash_source qemu-prefault)"
"""


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
@click.version_option(__version__, prog_name="qemu-prefault")
@prefault_options
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """Fill the stage-2 page tables of a running QEMU/KVM guest before the guest needs them.

    qemu-prefault finds QEMU's vCPUs and RAM over QMP, and populates the RAM. It makes KVM map the
    RAM with the KVM_PRE_FAULT_MEMORY ioctl of Linux 6.11, and verifies the result with KVM's
    counters. A running guest is paused while KVM maps the RAM, and is then resumed. A paused guest
    stays paused.
    """
    if ctx.invoked_subcommand is None:
        prefault(ctx, **given)
    elif given["qmp"] or given["domain"] or given["pid"]:
        raise click.UsageError(
            f"write options after the command: qemu-prefault {ctx.invoked_subcommand} --qmp …"
        )


for _command in (conformance, demo, libvirt, map_, plugin_path, probe, run, stats):
    cli.add_command(_command)


def main() -> None:
    """Run the command line, and report usage errors and failed writes."""
    install_hooks()
    as_json = "--json" in sys.argv[1:]
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = cli.main(prog_name="qemu-prefault", standalone_mode=False)
    except click.ClickException as error:
        if not as_json:
            _show(error)
            sys.exit(error.exit_code)
        fail(InputError(error.format_message(), "see: qemu-prefault --help"), as_json)
    except click.Abort:
        sys.exit(int(ExitStatus.FAILED))
    except OSError as error:
        drop_stdout()
        say(f"qemu-prefault: the result could not be written: {error.strerror}")
        sys.exit(int(ExitStatus.FAILED))
    sys.exit(int(status or 0))


def _show(error: click.ClickException) -> None:
    """Print a usage error like click, but escape the message, which contains arguments."""
    message, shown = error.format_message(), io.StringIO()
    error.show(shown)
    for line in shown.getvalue().replace(message, printable(message)).splitlines():
        say(line)
