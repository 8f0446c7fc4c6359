# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that signal frames have the size of the thread's own FPU state on CPUs with AMX."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.native import link_with_plugin

SOURCE = Path(__file__).with_name("xstate.c")
MAGIC1 = "0x46505853"
TILE_CONFIGURATION, TILE_DATA = 1 << 17, 1 << 18
#: The sizes of the state without and with tile data, in bytes.
SMALL, LARGE = 2816, 11008


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_with_plugin(SOURCE, tmp_path_factory.mktemp("xstate") / "xstate", parts=())


@pytest.mark.parametrize(
    ("in_use", "size", "magic2"),
    [
        (0, SMALL, [SMALL, LARGE]),
        (0xE7, SMALL, [SMALL, LARGE]),
        (TILE_CONFIGURATION, SMALL, [SMALL, LARGE]),
        (TILE_CONFIGURATION | TILE_DATA, LARGE, [LARGE]),
    ],
)
def test_size_includes_tiles_only_if_used(
    program: Path, in_use: int, size: int, magic2: list[int]
) -> None:
    output = subprocess.run([program, str(in_use)], check=True, capture_output=True, text=True)
    assert output.stdout.split() == [MAGIC1, str(size), str(size + 4), *map(str, magic2)]
