# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the man pages are current and complete, and fit into 80 columns."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from qemu_prefault.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "man"
PAGES = sorted(path.stem for path in MAN.glob("*.1"))
SECTIONS = ("NAME", "SYNOPSIS", "REQUIREMENTS", "OPTIONS", "FIELDS", "OVERHEAD", "EXAMPLES")


@pytest.fixture(scope="module")
def make_docs() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "make-docs.py"))


def read(name: str) -> str:
    return (MAN / f"{name}.1").read_text()


def options(command: click.Command) -> Iterator[str]:
    for param in command.params:
        if isinstance(param, click.Option):
            yield from (*param.opts, *param.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from options(inner)


def test_every_command_has_a_page() -> None:
    assert sorted(["qemu-prefault", *(f"qemu-prefault-{name}" for name in cli.commands)]) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_man_page_is_up_to_date(name: str, make_docs: dict[str, Any]) -> None:
    first_line = read(name).partition("\n")[0]
    assert first_line == make_docs["GENERATED"] + make_docs["digest"](name), "run `make man`"


@pytest.mark.parametrize("name", PAGES)
def test_man_page_has_every_option(name: str) -> None:
    text = read(name).replace("\\-", "-")
    command: click.Command = cli
    if name != "qemu-prefault":
        command = cli.commands[name.removeprefix("qemu-prefault-")]
        found = options(command)
    else:
        found = (spelling for param in cli.params for spelling in param.opts)
    assert [spelling for spelling in found if spelling not in text] == []


@pytest.mark.parametrize("name", PAGES)
def test_man_page_has_every_section(name: str) -> None:
    found = re.findall(r"^\.SH \"?([^\"\n]+)", read(name), re.MULTILINE)
    if "COMMANDS" in found:  # the page of a command group lists options below each command
        found.append("OPTIONS")
    assert [section for section in SECTIONS if section not in found] == []


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
@pytest.mark.parametrize("name", PAGES)
def test_man_page_fits_80_columns(name: str) -> None:
    argv = ["man", "--warnings", "-E", "UTF-8", "-l", str(MAN / f"{name}.1")]
    environment = {**os.environ, "MANWIDTH": "80", "MAN_KEEP_FORMATTING": ""}
    result = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
