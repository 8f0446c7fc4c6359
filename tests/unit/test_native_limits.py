# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin finds each limit of QEMU of which it uses a part."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_prefault._native import ffi, lib
from qemu_prefault.host import task_limits

RESERVE = int(lib.LIMITS_RESERVE)
ROOT = os.geteuid() == 0


@contextmanager
def limits(
    cgroup: str | Path, mountinfo: str | Path, *, locks_memory: bool = False
) -> Iterator[Callable[..., str]]:
    """Yield a function that returns the clause about the strictest limit, or an empty string."""
    files = ffi.new("struct limits_files *")
    lib.pf_limits_find(b"/proc", os.fsencode(cgroup), os.fsencode(mountinfo), files)
    files.locks_memory = locks_memory

    def check(**need: int) -> str:
        clause = ffi.new("char[1024]")
        needed = ffi.new("struct limits_need *", {"reserve": RESERVE, **need})
        fits = lib.pf_limits_check(files, needed, clause, 1024)
        return "" if fits else ffi.string(clause).decode()

    try:
        yield check
    finally:
        for fd in (files.proc, files.pids):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def check() -> Iterator[Callable[..., str]]:
    with limits("/nonexistent", "/nonexistent") as function:
        yield function


@contextmanager
def soft_limit(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def write_group(directory: Path, most: object, used: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pids.max").write_text(f"{most}\n")
    (directory / "pids.current").write_text(f"{used}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("inner", "outer", "limited"),
    [
        (("max", 5), ("max", 9), None),
        ((RESERVE + 8, 5), ("max", 9), None),
        ((RESERVE + 7, 5), ("max", 9), "slice/a vm"),
        (("max", 5), (RESERVE + 11, 9), "slice"),
        ((0, 5), (0, 9), "slice/a vm"),
        (("12x", 5), ("", 9), None),
    ],
)
def test_every_pids_cgroup_counts(
    tmp_path: Path,
    version: int,
    inner: tuple[object, int],
    outer: tuple[object, int],
    limited: str | None,
) -> None:
    group = tmp_path / "mount/slice/a vm"
    write_group(group, *inner)
    write_group(group.parent, *outer)
    cgroup, mountinfo = tmp_path / "cgroup", tmp_path / "mountinfo"
    kind, options = ("cgroup", "rw,pids") if version == 1 else ("cgroup2", "rw")
    cgroup.write_text("5:pids:/slice/a vm\n" if version == 1 else "0::/slice/a vm\n")
    mountinfo.write_text(f"1 2 0:3 / {tmp_path}/mount rw - {kind} {kind} {options}\n")
    with limits(cgroup, mountinfo) as check:
        clause = check(tasks=3)
    python = task_limits.pids_limits(cgroup.read_text(), mountinfo.read_text())
    assert any(limit.left < RESERVE + 3 for limit in python) == (limited is not None)
    if limited is None:
        assert clause == ""
    else:
        most, used = inner if limited.endswith("vm") else outer
        path = tmp_path / "mount" / limited
        assert clause == (
            f"it needs 3 tasks and must leave {RESERVE} for QEMU, but pids.max of {path} is "
            f"{most}, of which {used} are in use. Raise this limit"
        )


def test_limit_is_read_again(tmp_path: Path) -> None:
    write_group(tmp_path / "mount/vm", "max", 5)
    (tmp_path / "cgroup").write_text("0::/vm\n")
    (tmp_path / "mountinfo").write_text(f"1 2 0:3 / {tmp_path}/mount rw - cgroup2 cgroup2 rw\n")
    with limits(tmp_path / "cgroup", tmp_path / "mountinfo") as check:
        assert check(tasks=1) == ""
        write_group(tmp_path / "mount/vm", 50, 5)
        assert "is 50, of which 5 are in use" in check(tasks=1)


def free_descriptors(limit: int) -> int:
    return limit - sum(int(name) < limit for name in os.listdir("/proc/self/fd")) + 1


def test_open_files_count(check: Callable[..., str]) -> None:
    limit = max(map(int, os.listdir("/proc/self/fd"))) + RESERVE + 20
    with soft_limit(resource.RLIMIT_NOFILE, limit):
        left = free_descriptors(limit)
        assert check(descriptors=left - RESERVE) == ""
        clause = check(descriptors=left - RESERVE + 1)
        assert clause.endswith(f"{limit - left} are in use. Raise this limit")
        assert f"but RLIMIT_NOFILE (ulimit -n) is {limit}, of which" in clause
        pipe = os.pipe()
        assert check(descriptors=left - RESERVE) != ""
        for fd in pipe:
            os.close(fd)


@pytest.mark.parametrize(
    ("kind", "field", "name"),
    [(resource.RLIMIT_AS, 0, "RLIMIT_AS"), (resource.RLIMIT_DATA, 5, "RLIMIT_DATA")],
)
def test_address_space_counts(check: Callable[..., str], kind: int, field: int, name: str) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
    reserve = RESERVE * int(lib.LIMITS_TASK_MIB) << 20
    with soft_limit(kind, used + reserve + (64 << 20)):
        assert check(bytes=32 << 20) == ""
        assert name in check(bytes=128 << 20)
        assert check(bytes=128 << 20, reserve=3) == ""


def in_child(
    user: int | None,
    limit: int,
    need: dict[str, int],
    kind: int = resource.RLIMIT_NPROC,
    *,
    locks_memory: bool = False,
) -> str:
    """Return the clause in a child process of another user with a limit."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        if user is not None:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        resource.setrlimit(kind, (limit, limit))
        with limits("/nonexistent", "/nonexistent", locks_memory=locks_memory) as check:
            os.write(writer, check(**need).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        text = answer.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@pytest.mark.skipif(not ROOT, reason="only root can change its user")
def test_tasks_of_a_user_count() -> None:
    text = in_child(54321, RESERVE + 3, {"tasks": 3})
    assert f"RLIMIT_NPROC (ulimit -u) is {RESERVE + 3}, of which 1 are in use" in text
    assert in_child(54321, RESERVE + 4, {"tasks": 3}) == ""
    assert in_child(None, 5, {"tasks": 3}) == ""  # the limit does not apply to root


@pytest.mark.skipif(not ROOT, reason="only root can change its user")
def test_locked_memory_counts() -> None:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    limit = (64 << 20) if hard == resource.RLIM_INFINITY else min(hard, 64 << 20)
    need = {"bytes": 1 << 20}
    clause = in_child(54321, limit, need, resource.RLIMIT_MEMLOCK, locks_memory=True)
    assert "RLIMIT_MEMLOCK in MiB (ulimit -l)" in clause
    assert in_child(54321, limit, need, resource.RLIMIT_MEMLOCK) == ""


def test_limits_of_the_host_count(check: Callable[..., str]) -> None:
    assert check(tasks=1, descriptors=1, mappings=1, bytes=1) == ""
    assert "kernel." in check(tasks=1 << 30)
    assert "vm.max_map_count is" in check(mappings=1 << 30)


def test_path_in_clause_is_printable(tmp_path: Path) -> None:
    group = tmp_path / "mount/\x1b[31m\xff"
    write_group(group, 3, 2)
    (tmp_path / "cgroup").write_text(f"0::/{group.name}\n")
    (tmp_path / "mountinfo").write_text(f"1 2 0:3 / {tmp_path}/mount rw - cgroup2 cgroup2 rw\n")
    with limits(tmp_path / "cgroup", tmp_path / "mountinfo") as check:
        assert "/mount/?[31m?? is 3" in check(tasks=1)


@pytest.mark.parametrize(
    ("smp", "count"),
    [
        ("", 1),
        ("4", 4),
        ("cpus=4", 4),
        ("4,maxcpus=240", 240),
        ("4,sockets=2,cores=3,threads=2", 12),
        ("maxcpus=8,sockets=8,cores=1,threads=1", 8),
        ("sockets=4096,cores=4096,threads=4096,dies=4096", 4096),
        ("99999999999999999999", 4096),
        ("-1,cores=", 4096),
        (",,=,cores=x", 1),
    ],
)
def test_vcpus_of_smp(smp: str, count: int) -> None:
    assert lib.pf_limits_vcpus(smp.encode()) == count
