# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: a thin user of the public API.

Each command is a module of its own. What it needs of the package is imported when it runs
(:mod:`qemu_prefault` exports the API lazily), so that ``--help`` and completion are quick.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import __version__
from ..errors import ExitStatus, InputError
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
  qemu-prefault --qmp /run/vm.qmp --cont         ... of a restored one, and start it
  qemu-prefault --qmp /run/vm.qmp --dry-run      what would be done
  qemu-prefault probe --qmp /run/vm.qmp          what works here, what does not, and why
  qemu-prefault run -- qemu-system-x86_64 …      start QEMU with the plugin, always prefaulted

\b
Exit status:
  0 every requested byte verified    3 partial
  1 failed                           4 this host or kernel cannot
  2 usage                            5 refused, to protect the guest

\b
Shell completion (zsh_source and fish_source likewise):
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

    Finds QEMU's vCPUs and RAM over QMP, populates the RAM, has KVM map it
    (KVM_PRE_FAULT_MEMORY, Linux 6.11), and checks KVM's counters that it did. A running guest
    is paused for the second step and resumed; a paused one stays paused.
    """
    if ctx.invoked_subcommand is None:
        prefault(ctx, **given)
    elif given["qmp"] or given["domain"] or given["pid"]:
        raise click.UsageError(
            f"write options behind the command: qemu-prefault {ctx.invoked_subcommand} --qmp …"
        )


for _command in (conformance, demo, libvirt, map_, plugin_path, probe, run, stats):
    cli.add_command(_command)


def main() -> None:
    """Entry point; click's own, but for --json and for a stdout that cannot be written."""
    as_json = "--json" in sys.argv[1:]
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = cli.main(prog_name="qemu-prefault", standalone_mode=False)
    except click.ClickException as error:
        if not as_json:
            error.show()
            sys.exit(error.exit_code)
        fail(InputError(error.format_message(), "see: qemu-prefault --help"), as_json)
    except click.Abort:
        sys.exit(int(ExitStatus.FAILED))
    except OSError as error:
        drop_stdout()
        say(f"qemu-prefault: the result could not be written: {error.strerror}")
        sys.exit(int(ExitStatus.FAILED))
    sys.exit(int(status or 0))
