# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the limits on what a hostile process can make the tool read."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_prefault
from qemu_prefault.agents import gadgets
from qemu_prefault.agents.qemu_process import open_memory
from qemu_prefault.errors import FailedError, GoneError
from qemu_prefault.host.bounded import list_bounded, read_bounded
from qemu_prefault.host.executable import is_static
from qemu_prefault.host.fds import take_fd
from qemu_prefault.host.kvm import BinaryStats
from qemu_prefault.host.mappings import MAX_MAPPINGS, parse_maps
from qemu_prefault.host.procfs import Process

PACKAGE = Path(qemu_prefault.__file__).parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="starts attackers as another user")
MIB = 1 << 20
#: The most memory by which a hostile process may make the tool grow.
MOST_GROWTH = 64 * MIB
OTHER_USER = 65534
#: Give up root, and become dumpable as after an exec.
BECOME_OTHER_USER = f"""
import ctypes, os, sys
os.setgroups([])
os.setresgid({OTHER_USER}, {OTHER_USER}, {OTHER_USER})
os.setresuid({OTHER_USER}, {OTHER_USER}, {OTHER_USER})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


def peak() -> int:
    """Return the highest memory use of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def attacker(code: str, *arguments: str) -> Iterator[Process]:
    """Yield a process of an unprivileged user that has run this Python code."""
    code = f"{BECOME_OTHER_USER}{code}\nprint('ready', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the attacker failed"
        yield Process.find(process.pid)
        process.kill()


#: Let /proc/PID/cmdline show a large mapping of zero pages, with prctl(PR_SET_MM_MAP).
LONG_COMMAND_LINE = """
import mmap, struct
size = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
code, end_code, stack = (int(stat[n - 3]) for n in (26, 27, 28))
data, end_data, brk = (int(stat[n - 3]) for n in (45, 46, 47))
now = libc.sbrk
now.restype = ctypes.c_void_p
fields = struct.pack("<11QQII", code, end_code, data, end_data, brk, now(0), stack,
                     start, start + size, start, start, 0, 0, 0xFFFFFFFF)
if libc.prctl(35, 14, fields, len(fields), 0):
    sys.exit("prctl: %d" % ctypes.get_errno())
"""


@needs_root
@pytest.mark.parametrize("size", [60 * MIB, MIB + (MIB >> 1)], ids=["bytes", "arguments"])
def test_command_line_is_bounded(size: int) -> None:
    with attacker(LONG_COMMAND_LINE, str(size)) as process:
        before = peak()
        with pytest.raises(FailedError, match="cmdline") as caught:
            process.arguments()
        assert caught.value.code == "proc"
        assert peak() - before < MOST_GROWTH


#: Map a large, sparse file as the text of a program.
LARGE_TEXT = """
import mmap
name, size = sys.argv[1], int(sys.argv[2])
fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o700)
os.truncate(fd, size)
pattern = b"\\x0f\\x05\\xc3\\x48\\xc7\\xc0\\x0f\\0\\0\\0\\x0f\\x05\\xb8\\x3c\\0\\0\\0\\x0f\\x05"
os.pwrite(fd, pattern, 4096)
area = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
"""


@needs_root
@pytest.mark.parametrize("name", ["libc.so.6", "ld-musl-x86_64.so.1", "notlibc.so"])
def test_foreign_text_is_not_used(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    directory = Path("/dev/shm") / f"prefault-test-{os.getpid()}"
    directory.mkdir()
    try:
        os.chown(directory, OTHER_USER, OTHER_USER)
        with attacker(LARGE_TEXT, str(directory / name), str(1500 * MIB)) as process:
            memory, maps, before = open_memory(process), process.maps(), peak()
            found = gadgets.find_gadgets(process, memory, maps)
            os.close(memory)
            used = {
                mapping.path
                for mapping in maps
                for address in (found.syscall_ret, found.sigreturn, found.exit_thread)
                if mapping.start <= address < mapping.end
            }
            assert len(used) == 1 and not used.pop().startswith(str(directory))
            assert peak() - before < MOST_GROWTH
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


@needs_root
def test_replaced_descriptor_is_refused() -> None:
    code = "os.dup2(os.memfd_create('anon_inode:kvm-vcpu-stats:0'), 9)"
    with attacker(code) as process:
        with pytest.raises(GoneError, match="descriptor 9"):
            take_fd(process, 9, "anon_inode:kvm-vcpu-stats:0")
        os.close(take_fd(process, 9))


#: Let descriptor 9 be a file whose header announces statistics of 800 MiB.
LARGE_STATISTICS = """
import struct
fd = os.memfd_create("statistics")
os.truncate(fd, 800 << 20)
name_size, count, table, data = (int(word) for word in sys.argv[1:])
os.pwrite(fd, struct.pack("<6I", 0, name_size, count, 0, table, data), 0)
os.dup2(fd, 9)
"""


@needs_root
@pytest.mark.parametrize(
    ("name_size", "count"),
    [(48, 12 << 20), (4080, 200 << 10), (0xFFFFFFFF, 0xFFFFFFFF)],
    ids=["counters", "names", "largest numbers"],
)
def test_statistics_are_bounded(name_size: int, count: int) -> None:
    """Check a descriptor that QEMU has put in the place of KVM's statistics."""
    with attacker(LARGE_STATISTICS, str(name_size), str(count), "24", "4096") as process:
        fd, before = take_fd(process, 9), peak()
        with pytest.raises(OSError, match="not a KVM statistics descriptor"):
            BinaryStats(fd)
        os.close(fd)
        assert peak() - before < MOST_GROWTH


@needs_root
def test_names_may_be_any_bytes() -> None:
    code = "libc = ctypes.CDLL(None)\nlibc.prctl(15, b'caf\\xe9', 0, 0, 0)\n"
    with attacker(code, os.fsdecode(b"\xff\xfe")) as process:
        assert process.name == "caf\udce9"
        assert process.arguments()[-1] == "\udcff\udcfe"
        assert process.status().name == "caf\udce9"


def test_number_of_mappings_is_bounded() -> None:
    line = b"1000-2000 rw-p 0 00:00 0\n"
    assert len(parse_maps(line * 1000)) == 1000
    with pytest.raises(FailedError) as caught:
        parse_maps(line * (MAX_MAPPINGS + 1))
    assert caught.value.code == "proc"


def test_limits_are_exact(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_bounded(str(file), 100) == b"x" * 100
    with pytest.raises(OSError, match="more than 99 bytes"):
        read_bounded(str(file), 99)
    assert list_bounded(str(tmp_path), 1) == ["file"]
    with pytest.raises(OSError, match="more than 0 entries"):
        list_bounded(str(tmp_path), 0)


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert read_bounded(str(tmp_path / "fifo"), 10) == b""


# --- the source ---

#: Calls whose result has any size. Each file may use them only where its data is not QEMU's.
UNBOUNDED = {"read_text", "read_bytes", "readlines", "pread", "preadv", "open"}
ALLOWED = {
    ("host/bounded.py", "pread"),  # after a check of the size
    ("host/executable.py", "open"),  # reads limited sizes
    ("host/memory_source.py", "open"),  # reads a page
    ("host/placement.py", "open"),  # writes
    ("host/reservations.py", "pread"),  # a constant size
    ("host/task_limits.py", "open"),  # reads a page
}
#: Files of other areas: they read from sockets, files of root or QEMU's replies.
OTHERS = {"agents/plugin.py", "agents/qmp.py"}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            # os.open() returns a descriptor, and os.read() has a size.
            if (module, node.func.attr) != ("os", "open"):
                yield node.func.attr


def test_every_read_is_bounded() -> None:
    found = {
        (name, call)
        for directory in ("host", "agents")
        for path in (PACKAGE / directory).glob("*.py")
        if (name := f"{directory}/{path.name}") not in OTHERS
        for call in calls(path)
        if call in UNBOUNDED
    }
    assert found <= ALLOWED


def test_leased_program_is_not_waited_for(tmp_path: Path) -> None:
    """Check a lease, which a process can hold on its own program (PR_SET_MM_EXE_FILE)."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel notifies the holder
    try:
        with open(program, "rb") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            started = time.monotonic()
            assert not is_static(str(program))
            with pytest.raises(BlockingIOError):
                read_bounded(str(program), MIB)
            assert time.monotonic() - started < 1
    finally:
        signal.signal(signal.SIGIO, before)
