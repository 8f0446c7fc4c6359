# SPDX-License-Identifier: GPL-2.0-or-later
"""Write man/qemu-prefault.1 from the help texts of the command line. Run by ``make man``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from qemu_prefault import __version__
from qemu_prefault.cli.main import cli

TARGET = Path(__file__).resolve().parent.parent / "man" / "qemu-prefault.1"

EXIT_STATUS = (
    ("0", "Every requested byte was prefaulted and verified."),
    ("1", "A step failed. The guest's run state is as it was found."),
    ("2", "The command line is wrong, or names something that does not exist."),
    ("3", "Some requested bytes are not accounted for. The report lists them."),
    ("4", "This host, kernel or QEMU lacks a feature that the command needs."),
    ("5", "The command refused to run, to protect the guest or the host."),
)
EXAMPLES = (
    ("Prefault all RAM of a running guest:", "qemu-prefault --qmp /run/vm.qmp"),
    ("Prefault a restored guest and start it:", "qemu-prefault --qmp /run/vm.qmp --cont"),
    ("Prefault a DIMM that was plugged at 4 GiB:", "qemu-prefault --qmp /run/vm.qmp --range 4G+1G"),
    ("Start QEMU with the plugin:", "qemu-prefault run -- qemu-system-x86_64 -accel kvm -m 4G …"),
    ("Check what works on this host:", "qemu-prefault probe --qmp /run/vm.qmp"),
)


def escape(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return "\n".join(r"\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield ".PP"
        yield escape(" ".join(paragraph.split()))


def options(command: click.Command) -> Iterator[str]:
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        names = r"\fR, \fB".join(escape(name) for name in sorted(option.opts, key=len))
        value = ""
        if not option.is_flag:
            if isinstance(option.type, click.Choice):
                value = "|".join(option.type.choices)
            else:
                value = option.metavar or option.type.name.split()[0].upper()
            value = rf" \fI{escape(value)}\fR"
        help_text = " ".join((option.help or "").split())
        if option.show_default and not option.is_flag:
            help_text += f" Default: {option.default}."
        yield from (".TP", rf"\fB{names}\fR{value}", escape(help_text))


def all_commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield all commands by name. The name of a subcommand is ``GROUP COMMAND``."""
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{prefix}{name} ")


def page() -> str:
    """Return the manual page as roff."""
    first, _, rest = (cli.help or "").partition("\n\n")
    title = " ".join(first.split()).rstrip(".")
    lines = [
        r".\" Written by scripts/make-man.py; do not edit.",
        f'.TH QEMU\\-PREFAULT 1 "" "qemu\\-prefault {__version__}"',
        ".SH NAME",
        escape(f"qemu-prefault - {title[0].lower()}{title[1:]}"),
        ".SH SYNOPSIS",
        r"\fBqemu\-prefault\fR \fB\-\-qmp\fR \fISOCK\fR [\fIoption\fR...]",
    ]
    commands = sorted(all_commands(cli))
    for name, command in commands:
        if isinstance(command, click.Group):
            continue
        lines += [".br", rf"\fBqemu\-prefault {escape(name)}\fR [\fIoption\fR...]"]
    lines += [".SH DESCRIPTION", *paragraphs(rest), ".SH OPTIONS", *options(cli)]
    lines.append(".SH COMMANDS")
    for name, command in commands:
        lines += [f".SS {escape(name)}", *paragraphs(command.help or ""), *options(command)]
    lines.append(".SH EXIT STATUS")
    for status, meaning in EXIT_STATUS:
        lines += [".TP", status, escape(meaning)]
    lines += [
        ".SH ENVIRONMENT",
        ".TP",
        r"\fBQEMU_PREFAULT_CACHE\fR",
        escape("Directory for the images of the demo. Default: ~/.cache/qemu-prefault."),
        ".SH EXAMPLES",
    ]
    for what, command_line in EXAMPLES:
        lines += [".PP", escape(what), ".PP", ".nf", "    " + escape(command_line), ".fi"]
    lines += [
        ".SH SHELL COMPLETION",
        escape("Add this line to ~/.bashrc. In other shells, use zsh_source or fish_source."),
        ".PP",
        escape('eval "$(_QEMU_PREFAULT_COMPLETE=bash_source qemu-prefault)"'),
        ".SH SEE ALSO",
        r"\fBqemu\-system\-x86_64\fR(1), \fBptrace\fR(2), \fBmadvise\fR(2), "
        + escape("Documentation/virt/kvm/api.rst (KVM_PRE_FAULT_MEMORY)"),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(page())
    else:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(page())
