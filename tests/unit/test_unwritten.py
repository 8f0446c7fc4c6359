# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the search for unwritten parts of files on a real tmpfs, which other users fill."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qemu_prefault.host import proc_files, unwritten, used_files
from qemu_prefault.host.mapped_file import file_system_limit
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.unwritten import find_unwritten
from qemu_prefault.host.used_files import UsedFiles
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
    result = find_unwritten(Process.find(os.getpid()), device, str(shared))
    return result.total({(device, n) for n in without})


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
    assert spent < 10
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
    monkeypatch.setattr(used_files, "MAX_PROCESSES", 3)
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


# --- files that only processes show ---


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs that counts its inodes."""
    unwritten._results.clear()
    with mounted("tmpfs", tmp_path / "counting", "size=64m") as point:
        yield point


def unseen(directory: Path) -> int | None:
    unwritten._results.clear()
    process = Process.find(os.getpid())
    return find_unwritten(process, device_of(directory), str(directory)).unseen


def deleted(path: Path, size: int = MIB) -> int:
    """Create and delete a file that consists of one hole, and return a descriptor."""
    sparse(path, size)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    return fd


@contextmanager
def in_flight(fd: int) -> Iterator[None]:
    """Close a descriptor while only a message in a socket's queue contains a copy."""
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [fd])
        os.close(fd)
        yield


def test_file_that_no_process_shows_is_unseen(counting: Path) -> None:
    with in_flight(deleted(counting / "ram")):
        assert unseen(counting) == 1


def test_open_file_is_found(counting: Path) -> None:
    fd = deleted(counting / "ram")
    try:
        assert unseen(counting) == 0
    finally:
        os.close(fd)


def test_every_kind_of_inode_is_found(counting: Path, tmp_path: Path) -> None:
    (counting / "file").write_bytes(b"")
    (counting / "deep" / "directory").mkdir(parents=True)
    (counting / "link").symlink_to("file")
    (counting / "hard").hardlink_to(counting / "file")
    os.mkfifo(counting / "fifo")
    left = counting / "left"
    left.mkdir()
    with mounted("tmpfs", counting / "deep" / "directory", "size=1m"):
        with subprocess.Popen(["cat"], cwd=left, stdin=subprocess.PIPE):
            left.rmdir()
            assert unseen(counting) == 0
        assert unseen(counting) == 0


def test_extended_attributes_are_not_files(counting: Path) -> None:
    """Check a file with attributes, which the kernel counts as inodes since Linux 6.6."""
    (counting / "file").write_bytes(b"")
    os.setxattr(counting / "file", "security.qemu-prefault", bytes(3000))
    assert unseen(counting) == 0
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(in_flight(deleted(counting / "ram")))
        assert unseen(counting) == 2


SEARCH = """
import os, sys
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.unwritten import find_unwritten
from qemu_prefault.host.used_files import UsedFiles
device = os.stat(sys.argv[1]).st_dev
device = os.major(device), os.minor(device)
print(find_unwritten(Process.find(os.getpid()), device, sys.argv[1]).unseen)
"""


@pytest.mark.parametrize(
    ("prefix", "expected"), [((), "0"), (("unshare", "--pid", "--fork", "--mount-proc"), "None")]
)
def test_uncounted_files_are_unknown_in_a_pid_namespace(
    shared: Path, prefix: tuple[str, ...], expected: str
) -> None:
    if os.readlink("/proc/self/ns/pid") != "pid:[4026531836]" and not prefix:
        pytest.skip("this is not the first PID namespace")
    try:
        Path("/proc/1/maps").read_bytes()
    except PermissionError:
        if not prefix:
            pytest.skip("process 1 is hidden from root")
    command = [*prefix, sys.executable, "-c", SEARCH, str(shared)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr


def test_file_behind_many_mappings_is_found(counting: Path) -> None:
    """Use a process whose maps have more than 2 MiB before the mapping of the file."""
    program = (
        "libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p; count = 40_000; "
        "fd = os.open('ram', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8 << 20); "
        "low = 0x10000000; size = count * 4096; os.unlink('ram'); "
        "map = lambda at, size, fd: libc.mmap("
        "ctypes.c_void_p(at), ctypes.c_size_t(size), 3, 0x12 if fd >= 0 else 0x32, fd, 0); "
        "map(low, size, -1); map(low + size, 8 << 20, fd); os.close(fd); "
        "[libc.mprotect(ctypes.c_void_p(at), 4096, 1) for at in range(low, low + size, 8192)]"
    )
    with process_named_qemu(program, counting):
        device = device_of(counting)
        result = find_unwritten(Process.find(os.getpid()), device, str(counting))
        assert (result.total(frozenset()), result.unseen) == (8 * MIB, 0)


def test_process_that_blocks_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a FIFO without a writer as the maps of a process."""
    proc = tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "comm").write_text("qemu\n")
    os.mkfifo(proc / "7" / "maps")
    monkeypatch.setattr(proc_files, "PROC", str(proc))
    monkeypatch.setattr(used_files, "PROCESS_SECONDS", 0.2)
    process = Process(7, 0)
    before = threading.active_count()
    try:
        for _ in range(2):
            search = UsedFiles(process, (0, 1), named_only=False, descriptors=False)
            assert list(search.files()) == [] and not search.complete
            # The second search skips the process.
            assert threading.active_count() <= before + 1
    finally:
        (proc / "7" / "maps").write_text("")


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
