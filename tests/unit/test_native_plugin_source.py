# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin respects the free space of guest RAM's file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault._native import ffi, lib
from support.native import link_with_plugin

MIB = 1 << 20
SIZE = 64 * MIB
UNLIMITED = int(lib.HEADROOM_UNLIMITED)


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
        # The plugin leaves the other file's missing memory and 32 MiB free.
        (16, "shared", 0, 16, "all"),
        (16, "shared", 0, 18, "resident"),
        (48, "shared", 0, 48, "resident"),
        (48, "shared", 48, 16, "all"),
        (64, "private", 0, 0, "all"),
        (64, "private", 64, 0, "all"),
        # A page fault on a private mapping also allocates the file's page.
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
    ("how", "other", "allowed"),
    [
        ("hook", 0, range(16, 33)),  # leaves 32 MiB free, because an empty file may grow
        ("hook", 10, range(8, 25)),
        ("hook", 40, range(1)),
        ("deferred", 10, range(2, 19)),  # stops before the space that is left is used up
    ],
)
def test_other_file_grows_during_populate(
    program: Path, tmpfs: Path, how: str, other: int, allowed: range
) -> None:
    """Allocate another file while the plugin populates the guest.

    When populating starts, the tmpfs has enough free space for the guest's 48 MiB. The other file
    then reduces this space, so the plugin must check the free space before each chunk.
    """
    done = subprocess.run(
        [
            *(program, tmpfs / "ram", str(48 * MIB), "shared", how),
            *(tmpfs / "other", str(other * MIB)),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    policy, populated = done.stdout.split()
    assert policy == "all"
    assert int(populated) in allowed
    assert os.statvfs(tmpfs).f_bavail * 4096 >= min(32, 64 - other) * MIB


def test_turn_whose_time_is_over_takes_one_step(program: Path, tmp_path: Path) -> None:
    """Populate while the guest waits, on a host so slow that no time is left for the work.

    The guest must wait for one step of 256 KiB only, and the plugin must still complete the work.
    """
    done = subprocess.run(
        [program, tmp_path / "ram", str(16 * MIB), "private", "hook", "late"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["all", "256", str(16 << 10)]


def committed(path: Path) -> tuple[int, int]:
    """Return the bytes that other files can still allocate, and the number of inodes."""
    with open(path, "rb") as file:
        ours = ffi.new("uint64_t[]", [os.fstat(file.fileno()).st_ino])
        inodes = ffi.new("uint64_t *")
        return lib.pf_source_committed(file.fileno(), ours, 1, inodes), int(inodes[0])


def test_committed_bytes_and_inodes_of_a_tmpfs(tmpfs: Path) -> None:
    ram = tmpfs / "a/b/ram"
    ram.parent.mkdir(parents=True)
    (tmpfs / "link").symlink_to("nowhere")
    for path, size, allocated in (
        (ram, 32, 0),
        (tmpfs / "a/sparse", 16, 0),
        (tmpfs / "half", 8, 4),
        (tmpfs / "full", 2, 2),
    ):
        with open(path, "wb") as file:
            file.truncate(size * MIB)
            if allocated:
                os.posix_fallocate(file.fileno(), 0, allocated * MIB)
    figures = os.statvfs(tmpfs)
    assert committed(ram) == (20 * MIB, figures.f_files - figures.f_ffree)


def test_deleted_file_is_not_counted_as_found(tmpfs: Path) -> None:
    ram, other = tmpfs / "ram", tmpfs / "other"
    ram.touch()
    with open(other, "wb") as file:
        file.truncate(MIB)
        other.unlink()
        figures = os.statvfs(tmpfs)
        assert committed(ram) == (0, figures.f_files - figures.f_ffree - 1)


def test_deep_tree_and_hard_links_are_unknown(tmpfs: Path) -> None:
    ram = tmpfs / "ram"
    ram.touch()
    (tmpfs / "1/2/3/4/5/6/7/8").mkdir(parents=True)
    assert committed(ram)[0] == 0
    (tmpfs / "1/2/3/4/5/6/7/8/9").mkdir()
    assert committed(ram)[0] == UNLIMITED
    (tmpfs / "1/2/3/4/5/6/7/8/9").rmdir()
    os.link(ram, tmpfs / "again")
    assert committed(ram)[0] == UNLIMITED


def test_few_threads_populate_at_the_same_time(program: Path, tmp_path: Path) -> None:
    """Populate with 16 threads, as if 16 vCPUs waited for the plugin.

    Each thread checks the memory that is left without the chunks that the others are populating.
    The plugin leaves as much memory free as four chunks need.
    """
    done = subprocess.run(
        [program, tmp_path / "ram", str(256 * MIB), "private", "hook", "crowd"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    policy, threads, populated = done.stdout.split()
    assert (policy, populated) == ("all", "256")
    assert int(threads) <= 4
