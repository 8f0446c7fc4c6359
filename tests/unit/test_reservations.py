# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a run counts the memory that other runs have yet to populate."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from qemu_prefault.host import reservations
from qemu_prefault.host.reservations import Reservation


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "runs"
    monkeypatch.setattr(reservations, "DIRECTORY", path)
    return path


def others() -> dict[str, int]:
    """Start a new run, and return the bytes that other runs have reserved."""
    with Reservation() as run, run.check() as found:
        return found


def test_reservations_of_other_runs_are_added() -> None:
    with Reservation() as first, Reservation() as second:
        with first.check():
            first.reserve({"host": 100, "hugetlb": 7})
        with second.check():
            second.reserve({"host": 20})
        assert others() == {"host": 120, "hugetlb": 7}
        with first.check() as found:
            assert found == {"host": 20}
    assert others() == {}


def test_populated_bytes_are_no_longer_reserved() -> None:
    with Reservation() as run:
        with run.check():
            run.reserve({"host": 1 << 30, "NUMA node 1": 50})
        run.take({"host": (1 << 30) - 5, "NUMA node 1": 60, "another": 1})
        assert others() == {"host": 5}
        run.release()
        assert others() == {}


def test_killed_run_reserves_nothing(directory: Path) -> None:
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        run = Reservation()
        with run.check():
            run.reserve({"host": 1})
        os.write(started, b"x")
        time.sleep(600)
    os.read(ready, 1)
    os.close(ready)
    os.close(started)
    assert others() == {"host": 1}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert others() == {}
    assert [path.name for path in directory.iterdir()] == ["lock"]


def test_checks_of_two_runs_exclude_each_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservations, "LOCK_SECONDS", 0.0)
    with Reservation() as run, run.check():
        lock = os.open(directory / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert others() == {}  # a run that holds the lock too long does not block others
        os.close(lock)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": "1"}', '{"host": -5}', "\0" * 99])
def test_damaged_file_is_ignored(directory: Path, text: str) -> None:
    directory.mkdir(parents=True)
    with (directory / "1-1").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        assert others() == {}


def test_unusable_directory_is_no_error(directory: Path) -> None:
    directory.parent.write_text("")
    with Reservation() as run, run.check() as found:
        run.reserve({"host": 1})
        run.take({"host": 1})
        assert found == {}
