# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that the manual page matches the command line's help."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_prefault.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "man" / "qemu-prefault.1"


def test_man_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "make-man.py"))["page"]
    assert PAGE.read_text() == page(), "run `make man`"


@pytest.mark.parametrize("name", ["", *cli.commands])
def test_man_page_has_every_option(name: str) -> None:
    text = PAGE.read_text().replace("\\-", "-")
    command = cli.commands[name] if name else cli
    for option in command.params:
        for spelling in (*option.opts, *option.secondary_opts):
            assert spelling in text


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_page_has_no_warnings() -> None:
    argv = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(PAGE)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
