# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin respects the free space of the file system of guest RAM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.native import link_with_plugin

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plugin_source.c")
    return link_with_plugin(source, tmp_path_factory.mktemp("source") / "start")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 64 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("only root may mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("how", ["hook", "learn"])
@pytest.mark.parametrize(
    ("guest", "mapped", "allocated", "other", "expected"),
    [
        (48, "shared", 0, 0, "all"),
        (64, "shared", 0, 0, "all"),
        (80, "shared", 0, 0, "resident"),
        (64, "shared", 64, 0, "all"),
        (16, "shared", 0, 48, "all"),  # leaves 48 MiB, the size of the other file
        (48, "shared", 0, 48, "resident"),
        (48, "shared", 48, 16, "all"),
        (64, "private", 0, 0, "all"),
        (64, "private", 64, 0, "all"),
        # The page fault of a private mapping also allocates the file's page.
        (80, "private", 0, 0, "resident"),
        (48, "private", 0, 48, "resident"),
    ],
)
def test_file_system(
    *,
    program: Path,
    tmpfs: Path,
    how: str,
    guest: int,
    mapped: str,
    allocated: int,
    other: int,
    expected: str,
) -> None:
    ram = tmpfs / "ram"
    with open(ram, "wb") as file:
        if allocated:
            os.posix_fallocate(file.fileno(), 0, allocated * MIB)
    if other:
        with open(tmpfs / "other", "wb") as file:
            file.truncate(other * MIB)
    done = subprocess.run(
        [program, ram, str(guest * MIB), mapped, how],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{expected}\n"
    assert ("the file system has" in done.stderr) == (expected == "resident")


@pytest.mark.parametrize(
    ("other", "least", "most"),
    [
        (0, 16, 32),  # leaves 32 MiB, because an empty file may grow
        (10, 8, 24),
        (40, 0, 0),
    ],
)
def test_other_file_grows_during_populate(
    program: Path, tmpfs: Path, other: int, least: int, most: int
) -> None:
    """Allocate another file during populating.

    The 48 MiB of the guest are free at its start, so the plugin must check before each chunk.
    """
    done = subprocess.run(
        [
            *(program, tmpfs / "ram", str(48 * MIB), "shared", "hook"),
            *(tmpfs / "other", str(other * MIB)),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    policy, populated = done.stdout.split()
    assert policy == "all"
    assert least <= int(populated) <= most
    assert os.statvfs(tmpfs).f_bavail * 4096 >= min(32, 64 - other) * MIB
