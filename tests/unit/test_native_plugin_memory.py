# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin does not populate more huge pages than the host has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.native import link_with_plugin


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plugin_memory.c")
    return link_with_plugin(source, tmp_path_factory.mktemp("memory") / "start")


@pytest.mark.parametrize("how", ["learn", "hook"])
def test_short_hugetlb_pool_is_not_populated(program: Path, how: str) -> None:
    done = subprocess.run([program, how], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel has no huge pages")
    page_size, short, populate = done.stdout.split()
    if page_size != str(2 << 20) or short != "1":
        pytest.skip("the default huge page size is not 2 MiB, or 64 GiB of huge pages are free")
    assert populate == "resident"
    assert "populating needs 65536 MiB of huge pages" in done.stderr
    assert "only present pages are prefaulted" in done.stderr
