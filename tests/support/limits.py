# SPDX-License-Identifier: GPL-2.0-or-later
"""Set real memory limits with file systems, cgroups and huge page pools.

Each function skips the test if the host does not permit the limit.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def mounted(kind: str, point: Path, options: str, source: str = "none") -> Iterator[Path]:
    """Mount a file system within the block."""
    point.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, *(["-o", options] if options else []), source, str(point)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount {kind}: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


@contextmanager
def ext4(point: Path, mib: int) -> Iterator[Path]:
    """Mount a new ext4 file system of ``mib`` MiB within the block."""
    image = point.with_suffix(".img")
    image.write_bytes(b"")
    os.truncate(image, mib * MIB)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip(f"mkfs.ext4: {made.stderr.decode().strip()}")
    with mounted("ext4", point, "loop", str(image)):
        yield point


@contextmanager
def swap(file: Path, mib: int) -> Iterator[None]:
    """Let the kernel swap to a new file within the block."""
    with open(file, "xb") as image:
        os.fchmod(image.fileno(), 0o600)
        os.posix_fallocate(image.fileno(), 0, mib * MIB)
    for command in (["mkswap", str(file)], ["swapon", str(file)]):
        done = subprocess.run(command, check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True)


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Resize the pool of 2 MiB pages within the block."""
    try:
        before = HUGE_PAGES.read_text()
        HUGE_PAGES.write_text(str(count))
    except OSError as error:
        pytest.skip(f"cannot resize the huge page pool: {error}")
    try:
        if int(HUGE_PAGES.read_text()) != count:
            pytest.skip(f"this host does not have {count} huge pages")
        yield
    finally:
        HUGE_PAGES.write_text(before)


def group_root(controller: str) -> tuple[Path, bool]:
    """Return the parent directory for new cgroups, and whether it is cgroup v2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            base = CGROUPS / controller
            inside = base / path.lstrip("/")
            return (inside if inside.is_dir() else base), False
    for unified in (CGROUPS, CGROUPS / "unified"):
        available = unified / "cgroup.controllers"
        if available.exists() and controller in available.read_text().split():
            with suppress(OSError):
                (unified / "cgroup.subtree_control").write_text(f"+{controller}")
            if controller in (unified / "cgroup.subtree_control").read_text().split():
                return unified, True
    pytest.skip(f"no {controller} cgroup controller is available")


@contextmanager
def cgroups(controller: str, depth: int = 1) -> Iterator[tuple[list[Path], bool]]:
    """Yield new nested cgroups, outermost first, and whether the hierarchy is v2."""
    parent, unified = group_root(controller)
    made: list[Path] = []
    try:
        for level in range(depth):
            group = Path(tempfile.mkdtemp(prefix="qemu-prefault-test-", dir=parent))
            made.append(group)
            if unified and level < depth - 1:
                (group / "cgroup.subtree_control").write_text(f"+{controller}")
            parent = group
    except OSError as error:
        for group in reversed(made):
            group.rmdir()
        pytest.skip(f"cannot create a cgroup: {error}")
    try:
        yield made, unified
    finally:
        for group in reversed(made):
            for pid in (group / "cgroup.procs").read_text().split():
                (made[0].parent / "cgroup.procs").write_text(pid)
            group.rmdir()


def in_group(group: Path) -> list[str]:
    """Return the arguments to prepend to a command to run it in a cgroup."""
    return ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"]


def out_of_memory_kills(group: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            for line in (group / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    raise AssertionError("this cgroup does not account memory")
