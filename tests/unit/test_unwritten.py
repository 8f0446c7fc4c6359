# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the search for unwritten parts of files on a real tmpfs, which other users fill."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qemu_prefault.host import unwritten
from qemu_prefault.host.memory_source import file_system_limit
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.unwritten import unwritten_bytes
from support.limits import MIB, mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs in which every user may create files."""
    unwritten._results.clear()
    with mounted("tmpfs", tmp_path / "shared", "size=256m,nr_inodes=0,mode=1777") as point:
        tmp_path.chmod(0o755)
        yield point


def device_of(path: Path) -> tuple[int, int]:
    device = path.stat().st_dev
    return os.major(device), os.minor(device)


def sparse(path: Path, size: int) -> int:
    """Create a file that consists of one hole, and return its inode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path.stat().st_ino


def run_as_other_user(program: str, directory: Path) -> None:
    """Run a Python program in a directory as another user."""
    drop = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    subprocess.run([sys.executable, "-c", drop + program], cwd=directory, check=True)


def found(shared: Path, *without: int) -> int:
    device = device_of(shared)
    return unwritten_bytes(Process.find(os.getpid()), device, {(device, n) for n in without})


def test_holes_in_all_directories_count(shared: Path) -> None:
    ours = sparse(shared / "a guest" / "ram", 8 * MIB)
    sparse(shared / "b" / "ram", 16 * MIB)
    (shared / "written").write_bytes(bytes(MIB))
    assert found(shared) == 24 * MIB
    assert found(shared, ours) == 16 * MIB


def test_file_of_a_mount_in_the_file_system_does_not_count(shared: Path) -> None:
    with mounted("tmpfs", shared / "other", "size=16m"):
        sparse(shared / "other" / "file", 4 * MIB)
        assert found(shared) == 0


def test_search_of_many_entries_ends(shared: Path) -> None:
    """Check that directories count as entries, and that a result is reused."""
    create = "for n in range(30_000): os.mkdir(f'd{n}')"
    run_as_other_user(create, shared)
    before = time.process_time()
    found(shared)
    spent = time.process_time() - before
    assert spent < 1
    before = time.process_time()
    for _ in range(100):
        found(shared)
    assert time.process_time() - before < spent + 0.5


def test_search_ends_after_the_maximum_of_entries(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unwritten, "MAX_ENTRIES", 100)
    for number in range(100):
        sparse(shared / "full" / str(number), MIB)
    directory = shared / "full" / "empty"
    for number in range(200):
        (directory / str(number)).mkdir(parents=True)
    assert found(shared) < 100 * MIB


def test_guests_of_root_come_before_processes_of_others(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that another user's processes, which have QEMU's name, do not hide a guest's file."""
    monkeypatch.setattr(unwritten, "MAX_PROCESSES", 3)
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(process_named_qemu(drop, shared))
        qemu = (
            "fd = os.open('ram', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8 << 20); "
            "area = mmap.mmap(fd, 8 << 20); os.unlink('ram')"
        )
        stack.enter_context(process_named_qemu(qemu, shared))
        assert found(shared) == 8 * MIB


@contextmanager
def process_named_qemu(program: str, directory: Path) -> Iterator[None]:
    """Run a Python program in a process with QEMU's name, and then wait in the process."""
    prepare = "import ctypes, mmap, os, sys; ctypes.CDLL(None).prctl(15, b'qemu', 0, 0, 0); "
    command = [sys.executable, "-c", f"{prepare}{program}; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield


def test_deep_directories_do_not_exhaust_descriptors(shared: Path) -> None:
    create = "for n in range(3000): os.mkdir('d'); os.chdir('d')"
    run_as_other_user(create, shared)
    assert found(shared) == 0


def test_symbolic_link_leads_nowhere(shared: Path, tmp_path: Path) -> None:
    """Check that root does not list a directory that a link at the path of a mapped file names."""
    secret = tmp_path / "secret"
    (secret / "below").mkdir(parents=True)
    os.utime(secret, (0, secret.stat().st_mtime))
    ram = shared / "x" / "ram"
    sparse(ram, MIB)
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as area:
        ram.unlink()
        ram.parent.rmdir()
        ram.parent.symlink_to(secret)
        process = Process.find(os.getpid())
        (mapping,) = [m for m in process.maps() if m.path.startswith(str(ram))]
        assert file_system_limit(process, mapping)
        assert area[0] == 0
    assert secret.stat().st_atime == 0
