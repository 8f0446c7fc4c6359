# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as the kernel sees it: its process, its threads, its memory map.

Parsers are pure functions of text (``parse_*``); :class:`Process` only reads files and hands
them over. A process can vanish between any two reads; that is the error ``qemu-gone``, never a
traceback. Its pid can also be used again, so a :class:`Process` remembers the start time and
checks it with :meth:`Process.check`.

File formats are those of proc(5).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..errors import Code, FailedError, GoneError, QemuPrefaultError, UnsupportedError

BackingKind = Literal["anonymous", "memfd", "shmem", "hugetlb", "file", "device"]

PROC: Final = "/proc"
#: Of a process whose threads come and go all the time.
MOST_LISTINGS: Final = 16


# --- reading ---


def gone(pid: int) -> GoneError:
    return GoneError(f"process {pid} is gone", "see whether QEMU has exited, and why")


def denied(path: str) -> UnsupportedError:
    return UnsupportedError(
        f"no permission to read {path}",
        "run as root, or as the user QEMU runs as with CAP_SYS_PTRACE",
        code=Code.PROC_PERMISSION,
    )


def read_file(path: str, pid: int) -> str:
    """Return a file of /proc/PID.

    :raises GoneError: if the process has vanished.
    :raises UnsupportedError: if it may not be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise gone(pid) from error
    except PermissionError as error:
        raise denied(path) from error
    except OSError as error:
        raise FailedError(
            f"cannot read {path}: {error.strerror}", "see whether /proc is mounted", code=Code.PROC
        ) from error


def read_optional(path: str) -> str | None:
    """Return a file's text; None if it does not exist, or says nothing to us."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def malformed(what: str, text: str) -> FailedError:
    return FailedError(
        f"{what} has an unknown form: {text[:120]!r}",
        "report this with the kernel's version (uname -r)",
        code=Code.PROC,
    )


# --- /proc/PID/status, stat, maps, cgroup ---


@dataclass(frozen=True, slots=True)
class Status:
    """What matters of ``/proc/PID/status``. Signal sets have bit N-1 for signal N.

    `ns_pids` are the process's ids from this pid namespace inwards; the last is what the
    process calls itself. `thread_features` lists e.g. ``shstk`` (CET shadow stack).
    `seccomp_filters` is None before Linux 5.9.
    """

    name: str
    tgid: int
    tracer_pid: int
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    ns_pids: tuple[int, ...]
    sig_blocked: int
    cap_effective: int
    seccomp: int
    thread_features: frozenset[str]
    seccomp_filters: int | None = None

    def has_capability(self, number: int) -> bool:
        """Whether the effective set holds capability `number`."""
        return bool(self.cap_effective >> number & 1)


def parse_status(text: str) -> Status:
    """Parse ``/proc/PID/status``.

    :raises FailedError: if it does not look like one.
    """
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key, value.strip())
    try:
        tgid = int(fields["Tgid"])
        uids, gids = (tuple(map(int, fields[key].split())) for key in ("Uid", "Gid"))
        if len(uids) != 4 or len(gids) != 4:
            raise malformed("/proc/PID/status", text)
        return Status(
            name=fields["Name"],
            tgid=tgid,
            tracer_pid=int(fields.get("TracerPid", "0")),
            uids=(uids[0], uids[1], uids[2], uids[3]),
            gids=(gids[0], gids[1], gids[2], gids[3]),
            ns_pids=tuple(map(int, fields.get("NSpid", fields.get("Pid", str(tgid))).split())),
            sig_blocked=int(fields["SigBlk"], 16),
            cap_effective=int(fields["CapEff"], 16),
            seccomp=int(fields.get("Seccomp", "0")),
            thread_features=frozenset(fields.get("x86_Thread_features", "").split()),
            seccomp_filters=parse_number(fields.get("Seccomp_filters")),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise malformed("/proc/PID/status", text) from error


def parse_start_time(text: str) -> int:
    """Return the start time of ``/proc/PID/stat``: clock ticks since boot, field 22.

    :raises FailedError: if it does not look like one.
    """
    # the command name is in parentheses and may hold any character, ')' and '\n' too
    fields = text[text.rfind(")") + 1 :].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError) as error:
        raise malformed("/proc/PID/stat", text) from error


@dataclass(frozen=True, slots=True)
class MemoryMapping:
    """One line of ``/proc/PID/maps``: ``start..end-1``, backed by `path` from `offset` on."""

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file (MAP_SHARED)."""
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        """Whether the process may write to it."""
        return self.perms[1] == "w"


_MAPPING: Final = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16}) "
    r"([0-9a-f]{2,8}):([0-9a-f]{2,8}) ([0-9]{1,20}) *(.*)",
    re.DOTALL,
)


def parse_maps(text: str) -> tuple[MemoryMapping, ...]:
    """Parse ``/proc/PID/maps``.

    :raises FailedError: at a line of another form.
    """
    return tuple(_parse_mapping(line) for line in text.split("\n") if line)


def _parse_mapping(line: str) -> MemoryMapping:
    match = _MAPPING.fullmatch(line)
    if match is None:
        raise malformed("a line of /proc/PID/maps", line)
    start, end = int(match[1], 16), int(match[2], 16)
    if end <= start:
        raise malformed("a line of /proc/PID/maps", line)
    return MemoryMapping(
        start=start,
        end=end,
        perms=match[3],
        offset=int(match[4], 16),
        device=(int(match[5], 16), int(match[6], 16)),
        inode=int(match[7]),
        path=match[8],
    )


def backing_of(mapping: MemoryMapping, page_size: int = 4096) -> BackingKind:
    """Tell what a mapping is made of; whether it is private or shared is ``mapping.shared``.

    :param page_size: page size of the backing as the monitor tells it
        (:attr:`MemorySection.page_size`): the path does not show that a memfd
        or a file is of huge pages.
    """
    path = mapping.path.removesuffix(" (deleted)")
    # An anonymous MAP_HUGETLB mapping is a file of this name too (fs/hugetlbfs/inode.c).
    if page_size > 4096 or path.startswith(("/anon_hugepage", "/dev/hugepages/")):
        return "hugetlb"
    if mapping.inode == 0:
        return "anonymous"
    if path.startswith("/memfd:"):
        return "memfd"
    if path.startswith(("/dev/shm/", "/dev/zero", "/SYSV")):
        return "shmem"
    if path.startswith("/dev/"):
        return "device"
    return "file"


def mappings_of(maps: Sequence[MemoryMapping], start: int, size: int) -> tuple[MemoryMapping, ...]:
    """Return the mappings that together cover ``start..start+size-1`` without a gap.

    :raises FailedError: if some byte of it is not mapped (code ``unmapped``): then the monitor
        and the process disagree.
    """
    found = tuple(m for m in maps if m.start < start + size and m.end > start)
    reached = start
    for mapping in found:
        if mapping.start > reached:
            break
        reached = mapping.end
    if reached < start + size:
        raise FailedError(
            f"QEMU has nothing mapped at {reached:#x}, where guest RAM should be",
            "the memory layout may have changed meanwhile: try again",
            code=Code.UNMAPPED,
        )
    return found


def thread_names(pid: int) -> dict[int, str]:
    """Return a process's threads, as ``/proc/PID/task/TID/comm`` names them; none if it is gone."""
    names = {}
    with contextlib.suppress(OSError, QemuPrefaultError):
        for tid in _list_threads(pid, lambda: os.listdir(f"{PROC}/{pid}/task")):
            with contextlib.suppress(OSError), open(f"{PROC}/{pid}/task/{tid}/comm") as comm:
                names[int(tid)] = comm.read().rstrip("\n")
    return names


def _list_threads(pid: int, list_tasks: Callable[[], list[str]]) -> list[str]:
    """List a process's threads until none of them can have been left out.

    The kernel's own list leaves out a live thread if another one ends while it is read: it goes
    on by count, and counts the one that ends even if it skips it (proc_task_readdir(),
    first_tid() and next_tid(), fs/proc/base.c). A CPU that is away in the middle of
    __unhash_process() (kernel/exit.c) makes every list of that time equally short. But the
    thread that ends is no longer counted by then (``Threads:`` of /proc/PID/status), and cannot
    be found by its number. So a list is whole if at least as many threads as were counted after
    it are still found after that.
    """
    found: list[str] = []
    for _ in range(MOST_LISTINGS):
        listed = list_tasks()
        count = _count_threads(pid)
        found = [tid for tid in listed if os.path.exists(f"{PROC}/{pid}/task/{tid}/comm")]
        if len(found) >= count:
            break
    return found


def _count_threads(pid: int) -> int:
    match = re.search(r"^Threads:\s+([0-9]{1,9})$", read_file(f"{PROC}/{pid}/status", pid), re.M)
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Process:
    """A process, pinned by pid and start time. Make one by :meth:`find` or :func:`identify`."""

    pid: int
    start_time: int

    @classmethod
    def find(cls, pid: int) -> Process:
        """Return the process with this id.

        :raises GoneError: if there is none.
        """
        return cls(pid, parse_start_time(read_file(f"{PROC}/{pid}/stat", pid)))

    def check(self) -> None:
        """Make sure that the pid still means the same, living process.

        :raises GoneError: if it has exited (a zombie counts as gone) or the pid is used again.
        """
        text = read_file(f"{PROC}/{self.pid}/stat", self.pid)
        state = text[text.rfind(")") + 1 :].split()[:1]
        if parse_start_time(text) != self.start_time or state in (["Z"], ["X"]):
            raise gone(self.pid)

    @property
    def exe(self) -> str | None:
        """Path of the program as this process sees it; None if that may not be known."""
        return self.link("exe")

    @property
    def name(self) -> str:
        """The command name (at most 15 characters)."""
        return read_file(f"{PROC}/{self.pid}/comm", self.pid).rstrip("\n")

    def arguments(self) -> tuple[str, ...]:
        """Return its command line."""
        return tuple(read_file(f"{PROC}/{self.pid}/cmdline", self.pid).split("\0")[:-1])

    def threads(self) -> tuple[int, ...]:
        """Return the ids of its threads, ascending."""
        names = _list_threads(self.pid, lambda: self.listdir("task"))
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def status(self, tid: int | None = None) -> Status:
        """Return the status of the process, or of its thread `tid`."""
        task = "" if tid is None else f"/task/{tid}"
        return parse_status(read_file(f"{PROC}/{self.pid}{task}/status", self.pid))

    def maps(self) -> tuple[MemoryMapping, ...]:
        """Return its memory map."""
        return parse_maps(read_file(f"{PROC}/{self.pid}/maps", self.pid))

    def thread_syscall(self, tid: int) -> str | None:
        """Return ``/proc/PID/task/TID/syscall`` (``202 0x… …`` or ``running``).

        None where it cannot be read: without CAP_SYS_PTRACE, or without
        CONFIG_HAVE_ARCH_TRACEHOOK.
        """
        text = read_optional(f"{PROC}/{self.pid}/task/{tid}/syscall")
        return None if text is None else text.strip()

    def link(self, name: str) -> str | None:
        try:
            return os.readlink(f"{PROC}/{self.pid}/{name}")
        except OSError:
            return None

    def listdir(self, name: str) -> list[str]:
        path = f"{PROC}/{self.pid}/{name}"
        try:
            return os.listdir(path)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise gone(self.pid) from error
        except PermissionError as error:
            raise denied(path) from error


def parse_number(text: str | None) -> int | None:
    """Return a file's only number; None if it has none ("max", or no such file)."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def thread_map(process: Process) -> dict[int, int]:
    """Return thread id as we see it, by thread id as the process sees it.

    They differ if it lives in a pid namespace of its own (NSpid of ``/proc/PID/status``).
    """
    threads = process.threads()
    if len(process.status().ns_pids) <= 1:
        return {tid: tid for tid in threads}
    found = {}
    for tid in threads:
        try:
            found[process.status(tid).ns_pids[-1]] = tid
        except GoneError:  # a worker thread ended while we looked
            continue
    return found


def tgid_of(tid: int) -> int | None:
    text = read_optional(f"{PROC}/{tid}/status")
    return None if text is None else parse_status(text).tgid


def comm_of(pid: int) -> str:
    return (read_optional(f"{PROC}/{pid}/comm") or "?").rstrip("\n")
