# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the attach agent and the plugin agree on each backing and limit.

Each row starts two real QEMUs with real limits. In the first QEMU, the attach agent populates a
stopped guest. In the second QEMU, the plugin populates memory before the first instruction. If the
host's KVM lacks the ioctl, support/capable_kvm.py simulates the ioctl.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.limits import (
    MIB,
    cgroups,
    ext4,
    huge_pages,
    in_group,
    mounted,
    out_of_memory_kills,
)
from support.plugin import capable_prefix, wait_started
from support.process import leftovers
from support.qemu import Qemu, StartQemu, kvm_usable, run_tool

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and cgroups require root"),
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened"),
    pytest.mark.skipif(
        not Path("/proc/self/ns/cgroup").readlink().name.endswith("[4026531835]"),
        reason="the plugin does not populate in a cgroup namespace",
    ),
]
SIZE = 64  # MiB of guest RAM


class Verdict(Enum):
    """The result of an agent's attempt to populate guest RAM."""

    POPULATED = "all memory is populated"
    PRESENT = "QEMU had allocated all memory"
    ABSENT = "nothing is populated, because the memory must stay absent"
    REFUSED = "nothing is populated, because a limit would be exceeded"


@dataclass
class Host:
    """The limits of one row."""

    place: Path
    stack: ExitStack
    prefix: Sequence[str] = ()
    groups: Sequence[Path] = ()
    other: Path | None = None
    other_mib: int = 0

    def tmpfs(self, mib: int, options: str = "", other: int = 0) -> None:
        """Put guest RAM on a tmpfs, where another file can still grow to ``other`` MiB."""
        self._mount("tmpfs", f"size={mib}M" + (f",{options}" if options else ""))
        self._promise(other)

    def ramfs(self) -> None:
        self._mount("ramfs", "")

    def ext4(self, mib: int, other: int = 0) -> None:
        self.place = self.stack.enter_context(ext4(self.place / "ext4", mib))
        self._promise(other)

    def template(self) -> None:
        """Write a file for guest RAM, except for its last MiB, and limit QEMU's memory.

        The limit suffices for QEMU's copy of the file, but not for a second copy.
        """
        self.tmpfs(SIZE + 40)
        file = self.place / "template"
        file.write_bytes(bytes(SIZE * MIB))
        write_again(file)
        self.memory_group(SIZE + 72)

    def overlay_on_tmpfs(self, mib: int) -> None:
        self.tmpfs(mib)
        self.overlay()

    def overlay(self) -> None:
        parts = [self.place / name for name in ("lower", "upper", "work")]
        for part in parts:
            part.mkdir()
        self._mount("overlay", ",".join(f"{part.name}dir={part}" for part in parts))

    def hugetlbfs(self, pages: int, options: str = "") -> None:
        self.huge_pages(pages)
        self._mount("hugetlbfs", f"pagesize=2M{options}")

    def huge_pages(self, pages: int) -> None:
        self.stack.enter_context(huge_pages(pages))

    def memory_group(self, mib: int, level: int = 0, depth: int = 1) -> None:
        """Limit one level of QEMU's memory cgroups."""
        self.groups, unified = self.stack.enter_context(cgroups("memory", depth))
        name = "memory.max" if unified else "memory.limit_in_bytes"
        (self.groups[level] / name).write_text(str(mib * MIB))
        self.prefix = in_group(self.groups[-1])

    def hugetlb_group(self) -> None:
        """Allocate the guest's huge pages, and limit the cgroup to half of them."""
        self.huge_pages(SIZE // 2)
        (group,), unified = self.stack.enter_context(cgroups("hugetlb"))
        name = "hugetlb.2MB.max" if unified else "hugetlb.2MB.limit_in_bytes"
        (group / name).write_text(str(SIZE // 2 * MIB))
        self.prefix = in_group(group)

    def hide_groups(self, *how: str) -> None:
        """Limit QEMU's cgroup, and start QEMU with a command that hides the limit."""
        self.memory_group(60)
        self.prefix = [*self.prefix, *how]

    def _mount(self, kind: str, options: str) -> None:
        self.place = self.stack.enter_context(mounted(kind, self.place / kind, options))

    def _promise(self, mib: int) -> None:
        if mib:
            self.other, self.other_mib = self.place / "other", mib
            self.other.write_bytes(b"")
            os.truncate(self.other, mib * MIB)

    def check_others(self) -> None:
        """Check that the other file can still grow, and that no process was killed."""
        if self.other is not None:
            with open(self.other, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.other_mib * MIB)
                file.truncate(0)
                file.truncate(self.other_mib * MIB)
        assert not self.groups or sum(map(out_of_memory_kills, self.groups)) == 0


Backing = Callable[[Path], Sequence[str]]


def backend(kind: str, options: str = "", size: int = SIZE) -> Backing:
    """Return a backing with one memory backend.

    In the options, ``PLACE`` stands for the directory that the test has prepared.
    """

    def arguments(place: Path) -> Sequence[str]:
        text = f"memory-backend-{kind},id=m,size={size}M,{options}".rstrip(",")
        text = text.replace("PLACE", str(place))
        return ("-m", f"{size}M", "-object", text, "-machine", "memory-backend=m")

    return arguments


def file(options: str, size: int = SIZE) -> Backing:
    return backend("file", f"mem-path=PLACE/ram,{options}", size)


def plain(*more: str) -> Backing:
    return lambda place: ("-m", f"{SIZE}M", *(word.replace("PLACE", str(place)) for word in more))


def two_files(one: str, other: str) -> Backing:
    """Return a backing with two NUMA nodes, each with a file for half of the memory."""

    def arguments(place: Path) -> Sequence[str]:
        words = ["-m", f"{SIZE}M", "-smp", "2"]
        for number, name in enumerate((one, other)):
            path = place / name
            path.parent.mkdir(exist_ok=True)
            text = f"id=n{number},size={SIZE // 2}M,share=on,mem-path={path}"
            words += ["-object", f"memory-backend-file,{text}", "-numa", f"node,memdev=n{number}"]
        return words

    return arguments


@dataclass(frozen=True)
class Row:
    """One backing with one limit, and the verdicts of both agents.

    :ivar source: The part of the attach agent's message that names the limit.
    :ivar plugin_source: The part of the plugin's message that names the limit.
    :ivar plugin: The plugin's verdict if it differs from the attach agent's, because the plugin has
        less information.
    :ivar populate: The ``populate`` option for both agents.
    """

    name: str
    backing: Backing
    verdict: Verdict
    limit: Callable[[Host], None] = lambda host: None
    source: str = ""
    plugin_source: str = ""
    plugin: Verdict | None = None
    populate: str = "auto"
    marks: Sequence[pytest.MarkDecorator] = (pytest.mark.full,)


QUICK: Sequence[pytest.MarkDecorator] = ()
POPULATED, PRESENT, ABSENT, REFUSED = Verdict
FILE_SYSTEM, GROUP = ("the file system of", "the file system has only"), ("cgroup", "host or the")
HIDDEN = ("cgroup", "the limits of some of QEMU's cgroups cannot be read")
NO_CGROUPS = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
CONTAINER = """
type=cgroup2 options=
if grep -q :memory: /proc/self/cgroup; then type=cgroup options=memory; fi
mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/x &&
mount -t $type -o "$options" none /sys/fs/cgroup/x && exec "$@"
"""
POOL = ("hugetlb has only", "pool or the cgroup has only")


def refused(
    name: str,
    backing: Backing,
    limit: Callable[[Host], None],
    sources: tuple[str, str],
    **more: Any,
) -> Row:
    return Row(name, backing, REFUSED, limit, *sources, **more)


ROWS = (
    # Memory without a limit.
    Row("default RAM", plain(), POPULATED, marks=QUICK),
    Row("ram", backend("ram"), POPULATED),
    Row("ram shared", backend("ram", "share=on"), POPULATED),
    Row("ram merge, no dump", backend("ram", "merge=on,dump=off"), POPULATED),
    Row("ram bound to node 0", backend("ram", "host-nodes=0,policy=bind"), POPULATED),
    Row("ram preallocated", backend("ram", "prealloc=on"), PRESENT),
    Row("ram reserve=off", backend("ram", "reserve=off"), ABSENT, marks=QUICK),
    Row("ram reserve=off, all", backend("ram", "reserve=off"), POPULATED, populate="all"),
    Row("memfd", backend("memfd", "share=on"), POPULATED, marks=QUICK),
    Row("memfd private", backend("memfd", "share=off"), POPULATED),
    Row("memfd not sealed", backend("memfd", "seal=off"), POPULATED),
    Row("ramfs", file("share=on"), POPULATED, Host.ramfs),
    Row("overlay", file("share=on"), ABSENT, Host.overlay),
    refused(
        "overlay on a tmpfs, private",
        file("share=off"),
        lambda h: h.overlay_on_tmpfs(40),
        ("the file system of", "a file system that contains files that QEMU cannot find"),
        marks=QUICK,
    ),
    # A file on a tmpfs.
    Row("tmpfs, fits exactly", file("share=on"), POPULATED, lambda h: h.tmpfs(SIZE)),
    Row("tmpfs private, fits exactly", file("share=off"), POPULATED, lambda h: h.tmpfs(SIZE)),
    Row(
        "tmpfs without inodes",
        backend("file", "mem-path=PLACE,share=on"),
        POPULATED,
        lambda h: h.tmpfs(SIZE, "nr_inodes=2"),
    ),
    Row("full tmpfs, preallocated", file("share=on,prealloc=on"), PRESENT, lambda h: h.tmpfs(SIZE)),
    Row(
        "tmpfs private, partly written",
        backend("file", "mem-path=PLACE/template,share=off"),
        POPULATED,
        Host.template,
        marks=QUICK,
    ),
    Row("two files", two_files("a", "b"), POPULATED, lambda h: h.tmpfs(80), marks=QUICK),
    Row("two directories", two_files("a/ram", "b/ram"), POPULATED, lambda h: h.tmpfs(100)),
    refused("tmpfs", file("share=on"), lambda h: h.tmpfs(40), FILE_SYSTEM, marks=QUICK),
    refused("tmpfs private", file("share=off"), lambda h: h.tmpfs(40), FILE_SYSTEM, marks=QUICK),
    refused("-mem-path", plain("-mem-path", "PLACE"), lambda h: h.tmpfs(40), FILE_SYSTEM),
    refused("tmpfs, two files", two_files("a", "b"), lambda h: h.tmpfs(48), FILE_SYSTEM),
    refused("tmpfs, two directories", two_files("a/r", "b/r"), lambda h: h.tmpfs(48), FILE_SYSTEM),
    refused("tmpfs, promised", file("share=on"), lambda h: h.tmpfs(90, other=40), FILE_SYSTEM),
    refused(
        "tmpfs, promised, private",
        file("share=off"),
        lambda h: h.tmpfs(90, other=40),
        FILE_SYSTEM,
    ),
    # A file on a disk.
    Row("disk", file("share=on"), ABSENT, lambda h: h.ext4(128), marks=QUICK),
    Row(
        "deleted file on a disk",
        backend("file", "mem-path=PLACE,share=on"),
        ABSENT,
        lambda h: h.ext4(128),
        marks=QUICK,
    ),
    Row("disk private", file("share=off"), POPULATED, lambda h: h.ext4(128)),
    Row("disk, all", file("share=on"), POPULATED, lambda h: h.ext4(128), populate="all"),
    refused("full disk, all", file("share=on"), lambda h: h.ext4(48), FILE_SYSTEM, populate="all"),
    # Memory cgroups.
    refused("own cgroup", plain(), lambda h: h.memory_group(60), GROUP, marks=QUICK),
    refused("parent cgroup", plain(), lambda h: h.memory_group(60, 0, 2), GROUP),
    refused("middle cgroup", plain(), lambda h: h.memory_group(60, 1, 3), GROUP),
    refused("memfd in a cgroup", backend("memfd"), lambda h: h.memory_group(60), GROUP),
    refused(
        "private memfd, twice in a cgroup",
        backend("memfd", "share=off"),
        lambda h: h.memory_group(SIZE + 50),
        GROUP,
        marks=QUICK,
    ),
    # QEMU cannot read the limits of its cgroups, so the plugin refuses.
    refused(
        "cgroup namespace",
        plain(),
        lambda h: h.hide_groups("unshare", "--cgroup"),
        HIDDEN,
        marks=QUICK,
    ),
    refused(
        "container",
        plain(),
        lambda h: h.hide_groups("unshare", "--cgroup", "--mount", "sh", "-c", CONTAINER, "sh"),
        HIDDEN,
    ),
    refused(
        "no cgroup file system",
        plain(),
        lambda h: h.hide_groups("unshare", "--mount", "sh", "-c", NO_CGROUPS, "sh"),
        HIDDEN,
    ),
    Row(
        "cgroup namespace without a limit",
        plain(),
        POPULATED,
        lambda h: setattr(h, "prefix", ["unshare", "--cgroup"]),
        plugin_source=HIDDEN[1],
        plugin=REFUSED,
    ),
    Row(
        "cgroup namespace, all",
        plain(),
        POPULATED,
        lambda h: setattr(h, "prefix", ["unshare", "--cgroup"]),
        populate="all",
    ),
    # Huge pages.
    Row(
        "huge pages, all reserved",
        backend("memfd", "hugetlb=on"),
        POPULATED,
        lambda h: h.huge_pages(SIZE // 2),
        marks=QUICK,
    ),
    Row(
        "hugetlbfs private",
        file("share=off"),
        POPULATED,
        lambda h: h.hugetlbfs(SIZE // 2),
    ),
    Row(
        "huge pages, none reserved, all",
        backend("memfd", "hugetlb=on,reserve=off"),
        POPULATED,
        lambda h: h.huge_pages(SIZE // 2),
        populate="all",
    ),
    refused(
        "no huge pages",
        backend("memfd", "hugetlb=on,reserve=off"),
        lambda h: h.huge_pages(8),
        POOL,
        populate="all",
        marks=QUICK,
    ),
    refused(
        "hugetlbfs, no pages",
        file("share=on,reserve=off"),
        lambda h: h.hugetlbfs(8),
        POOL,
        populate="all",
    ),
    refused(
        "hugetlbfs with a size",
        file("share=on,reserve=off"),
        lambda h: h.hugetlbfs(SIZE // 2, ",size=32M"),
        FILE_SYSTEM,
        populate="all",
    ),
    refused(
        "hugetlbfs with a size, private",
        file("share=off,reserve=off"),
        lambda h: h.hugetlbfs(SIZE // 2, ",size=32M"),
        FILE_SYSTEM,
        populate="all",
    ),
    Row(
        "hugetlbfs with a minimum size",
        file("share=on,reserve=off"),
        POPULATED,
        lambda h: h.hugetlbfs(SIZE // 2 + 8, ",min_size=8M"),
        populate="all",
    ),
    Row(
        "huge pages in a cgroup",
        backend("memfd", "hugetlb=on"),
        REFUSED,
        Host.hugetlb_group,
        "cgroup",
        POOL[1],
    ),
    # The plugin leaves 32 MiB free if the file system contains other files.
    Row(
        "tmpfs, the rest is not promised",
        file("share=on"),
        POPULATED,
        lambda h: h.tmpfs(SIZE + 24, other=8),
        plugin_source=FILE_SYSTEM[1],
        plugin=REFUSED,
        marks=QUICK,
    ),
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    place = tmp_path / "place"
    place.mkdir()
    with ExitStack() as stack:
        yield Host(place, stack)


def write_again(template: Path) -> None:
    """Give the last MiB of the file back to the file system."""
    os.truncate(template, (SIZE - 1) * MIB)
    os.truncate(template, SIZE * MIB)


def clear(place: Path) -> None:
    """Remove the guest's files, so that the next QEMU creates them again."""
    for path in place.rglob("*"):
        if path.name == "template":
            write_again(path)
        elif path.is_file() and path.name != "other":
            path.unlink()


@contextmanager
def running(qemu: Qemu) -> Iterator[Qemu]:
    try:
        yield qemu
    finally:
        qemu.kill()


def by_attach(qemu: Qemu, row: Row) -> Verdict:
    result = run_tool(qemu, "--populate-only", "--agent", "attach", "--populate", row.populate)
    assert leftovers(qemu.pid) == []
    if result.status == 5:
        assert result.error["code"] == "no-memory"
        assert row.source in result.error["cause"]
        return REFUSED
    report = result.complete()
    if report["bytes"]["populated"] > (SIZE - 2) * MIB:
        assert report["warnings"] == []
        return POPULATED
    assert report["bytes"]["populated"] < 2 * MIB
    return ABSENT if result.warnings == {"resident-only"} else PRESENT


def by_plugin(qemu: Qemu, row: Row, control: Path) -> Verdict:
    status = wait_started(qemu, control)
    qemu.kill()
    assert qemu.process.stderr is not None
    said = qemu.process.stderr.read().decode(errors="replace")
    assert status["counters"]["errors"] == 0, said
    if "populating needs" in said:
        assert row.plugin_source in said
        assert status["populate"] == "resident"
        assert status["counters"]["populated"] < 2 * MIB
        return REFUSED
    ram = max(status["slots"], key=lambda slot: int(slot["size"]))
    if ram["resident_only"]:
        assert status["counters"]["populated"] < 2 * MIB
        return ABSENT
    assert status["counters"]["populated"] > (SIZE - 2) * MIB
    return POPULATED


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=row.marks) for row in ROWS])
def test_attach_and_plugin_agree(
    start_qemu: StartQemu, host: Host, tmp_path: Path, row: Row
) -> None:
    row.limit(host)
    arguments = row.backing(host.place)
    with running(start_qemu(*arguments, accel="kvm", prefix=host.prefix)) as qemu:
        assert by_attach(qemu, row) is row.verdict
        host.check_others()
    clear(host.place)
    control = tmp_path / "control"
    plugin = ("-plugin", f"{plugin_path()},socket={control},populate={row.populate}")
    prefix = [*host.prefix, *capable_prefix()]
    with running(start_qemu(*plugin, *arguments, accel="kvm", paused=False, prefix=prefix)) as qemu:
        verdict = by_plugin(qemu, row, control)
        expected = row.plugin or row.verdict
        assert verdict is (POPULATED if expected is PRESENT else expected)
        host.check_others()
