# SPDX-License-Identifier: GPL-2.0-or-later
"""Read QEMU's threads, memory map and status from ``/proc/PID``.

The parsers (``parse_*``) are pure functions of text. :class:`Process` reads the files and passes
their text to the parsers. If the process exits between two reads, the next read raises
:class:`GoneError` (code ``qemu-gone``). The kernel can reuse a pid. Therefore :meth:`Process.find`
opens the directory ``/proc/PID``, and all later reads use the open directory
(:mod:`qemu_prefault.host.pin`).

All contents are untrusted, because QEMU controls many of them. Every read has a limit
(:mod:`qemu_prefault.host.bounded`), and text that is not UTF-8 is decoded with surrogateescape.

proc(5) describes the file formats.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from ..errors import Code, FailedError, GoneError, QemuPrefaultError, UnsupportedError
from ..units import PAGE_SIZE
from .bounded import limit_of, list_bounded, read_bounded
from .pin import Pin, Traits, program_addresses

BackingKind = Literal["anonymous", "memfd", "shmem", "hugetlb", "file", "device"]

PROC: Final = "/proc"
#: Numbers of system calls, from arch/x86/entry/syscalls/syscall_64.tbl.
NANOSLEEP, FUTEX, CLOCK_NANOSLEEP = 35, 202, 230
#: Maximum number of attempts to list all threads of a process.
MOST_LISTINGS: Final = 16
#: Maximum number of mappings and of arguments of a process. The kernel's default limit on mappings
#: is 65,530 (vm.max_map_count).
MAX_MAPPINGS: Final = 1 << 16
MAX_ARGUMENTS: Final = 1 << 16


def gone(pid: int) -> GoneError:
    """Return the error for a process that has exited."""
    return GoneError(
        f"process {pid} has exited", "see QEMU's log for the reason if the process is QEMU"
    )


def changed(pid: int) -> GoneError:
    """Return the error for a process that is no longer the one that was identified."""
    return GoneError(
        f"process {pid} has executed another program or changed its user since qemu-prefault "
        "identified it as QEMU",
        "check which program process "
        f"{pid} runs now (ps -p {pid}), and run qemu-prefault again if it is QEMU",
    )


def beyond_limit(cause: str) -> FailedError:
    """Return the error for a file in /proc that is larger than an ordinary QEMU needs."""
    return FailedError(
        cause,
        "check whether the process is a QEMU that works correctly, because an ordinary QEMU does "
        "not reach this limit",
        code=Code.PROC,
    )


def is_hidden(pid: int) -> bool:
    """Return whether /proc hides a process or thread that exists."""
    if os.path.isdir(f"{PROC}/{pid}"):
        return False  # /proc shows the process, which is exiting
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def hidden(pid: int) -> UnsupportedError:
    """Return the error for a process that /proc does not show."""
    return UnsupportedError(
        f"process {pid} exists, but /proc does not show it",
        "run qemu-prefault as root on the host, and check whether the hidepid= option of /proc or "
        "the ProtectProc= setting of the service hides the process",
        code=Code.PROC_PERMISSION,
    )


def denied(path: str) -> UnsupportedError:
    """Return the error for a /proc file that this process is not allowed to read."""
    return UnsupportedError(
        f"this process has no permission to read {path}",
        "run qemu-prefault as root, or as QEMU's user with CAP_SYS_PTRACE",
        code=Code.PROC_PERMISSION,
    )


def read_file(path: str, pid: int, shown: str | None = None) -> str:
    """Return the text of a /proc/PID file.

    :param shown: The name of the file in messages, if ``path`` uses a descriptor of the pinned
        process.
    :raises GoneError: If the process has exited.
    :raises UnsupportedError: If this process has no permission to read the file, or if /proc does
        not show the process.
    :raises FailedError: If this process cannot read the file for another reason. One reason is that
        the file is larger than its limit (code ``proc``).
    """
    return read_file_bytes(path, pid, shown).decode("utf-8", "surrogateescape")


def read_file_bytes(path: str, pid: int, shown: str | None = None) -> bytes:
    """Return the content of a /proc/PID file.

    The parameters and errors are those of :func:`read_file`.
    """
    try:
        return read_bounded(path, limit_of(path))
    except OSError as error:
        raise read_error(error, path, pid, shown) from error


def read_error(error: OSError, path: str, pid: int, shown: str | None = None) -> QemuPrefaultError:
    """Return the error for a file or a directory in /proc that could not be read.

    The parameters are those of :func:`read_file`.
    """
    name = shown or path
    if isinstance(error, (FileNotFoundError, ProcessLookupError)):
        if not f"{name}/".startswith(f"{PROC}/{pid}/"):
            return UnsupportedError(
                f"/proc does not show {name}",
                "run qemu-prefault where /proc is mounted without subset=pid. If a systemd service "
                "runs qemu-prefault, remove ProcSubset=pid from the service's unit",
                code=Code.PROC_PERMISSION,
            )
        return hidden(pid) if shown is None and is_hidden(pid) else gone(pid)
    if isinstance(error, PermissionError):
        return denied(name)
    if error.errno == errno.EFBIG:
        return beyond_limit(f"cannot read {name}: {error.strerror}")
    return FailedError(
        f"cannot read {name}: {error.strerror}",
        "check whether /proc is mounted",
        code=Code.PROC,
    )


def read_limited(path: str) -> str:
    """Return the text of a file, whose size is limited by :func:`~.bounded.limit_of`.

    :raises OSError: If the file cannot be read or is too large.
    """
    return read_bounded(path, limit_of(path)).decode("utf-8", "surrogateescape")


def read_optional(path: str) -> str | None:
    """Return a file's text, or None if the file cannot be read or is too large."""
    try:
        return read_limited(path)
    except (OSError, ValueError):  # ValueError: a path from another file contains a null character
        return None


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a text that are not empty, without building a list of all lines."""
    return (match[0] for match in re.finditer(r"[^\n]+", text))


def malformed(what: str, text: str) -> FailedError:
    """Return the error for a /proc file in an unknown format."""
    return FailedError(
        f"{what} has an unknown format: {text[:120]!r}",
        "report this error with the kernel's version (uname -r)",
        code=Code.PROC,
    )


@dataclass(frozen=True, slots=True)
class Status:
    """The fields of ``/proc/PID/status`` that qemu-prefault uses.

    In a set of signals, bit N-1 represents signal N. ``ns_pids`` contains the ids of the process in
    nested pid namespaces. The first id is the one in this pid namespace, and the last id is the one
    in the process's own pid namespace. ``thread_features`` may contain, for example, ``shstk`` (CET
    shadow stack). ``seccomp_filters`` is the number of seccomp filters, or None before Linux 5.9.
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
        """Return whether the effective capability set contains capability ``number``."""
        return bool(self.cap_effective >> number & 1)


def parse_status(text: str) -> Status:
    """Return the fields in the text of ``/proc/PID/status``.

    :raises FailedError: If the text has another format.
    """
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key, value.strip())
    try:
        tgid = int(fields["Tgid"])
        uids, gids = (tuple(map(int, fields[key].split())) for key in ("Uid", "Gid"))
        ns_pids = tuple(map(int, fields.get("NSpid", fields.get("Pid", str(tgid))).split()))
        if len(uids) != 4 or len(gids) != 4 or not ns_pids:
            raise malformed("/proc/PID/status", text)
        return Status(
            name=fields["Name"],
            tgid=tgid,
            tracer_pid=int(fields.get("TracerPid", "0")),
            uids=(uids[0], uids[1], uids[2], uids[3]),
            gids=(gids[0], gids[1], gids[2], gids[3]),
            ns_pids=ns_pids,
            sig_blocked=int(fields["SigBlk"], 16),
            cap_effective=int(fields["CapEff"], 16),
            seccomp=int(fields.get("Seccomp", "0")),
            thread_features=frozenset(fields.get("x86_Thread_features", "").split()),
            seccomp_filters=parse_number(fields.get("Seccomp_filters")),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise malformed("/proc/PID/status", text) from error


def parse_start_time(text: str) -> int:
    """Return field 22 of ``/proc/PID/stat``, the start time in ticks since boot.

    :raises FailedError: If the text has another format.
    """
    # The command name is in parentheses and may contain any character, even ')' and '\n'.
    fields = text[text.rfind(")") + 1 :].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError) as error:
        raise malformed("/proc/PID/stat", text) from error


@dataclass(frozen=True, slots=True)
class MemoryMapping:
    """One mapping of a process, from one line of ``/proc/PID/maps``.

    At the addresses ``start..end-1``, the process has mapped the file at ``path``, starting at byte
    ``offset``.
    """

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def size(self) -> int:
        """The size of the mapping in bytes."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes to the memory also change the file (MAP_SHARED)."""
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        """Whether the process may write to the memory."""
        return self.perms[1] == "w"


_MAPPING: Final = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16}) "
    rb"([0-9a-f]{2,8}):([0-9a-f]{2,8}) ([0-9]{1,20}) *([^\0]*)",
)


def parse_maps(data: bytes) -> tuple[MemoryMapping, ...]:
    """Return the mappings in the content of ``/proc/PID/maps``.

    The content is bytes, because Python stores a text with one character beyond the Basic
    Multilingual Plane in four bytes per character.

    :raises FailedError: If a line has another format.
    """
    if data.count(b"\n") > MAX_MAPPINGS:
        raise beyond_limit(f"/proc/PID/maps has more than {MAX_MAPPINGS} mappings")
    # Most mappings share their file with other mappings.
    files: dict[bytes, str] = {}
    devices: dict[tuple[int, int], tuple[int, int]] = {}
    mappings = []
    for line in re.finditer(rb"[^\n]+", data):
        match = _MAPPING.fullmatch(line[0])
        if match is None or (end := int(match[2], 16)) <= (start := int(match[1], 16)):
            text = line[0][:480].decode("utf-8", "surrogateescape")
            raise malformed("a line of /proc/PID/maps", text)
        if (path := files.get(match[8])) is None:
            path = files[match[8]] = match[8].decode("utf-8", "surrogateescape")
        device = (int(match[5], 16), int(match[6], 16))
        mappings.append(
            MemoryMapping(
                start=start,
                end=end,
                perms=sys.intern(match[3].decode()),
                offset=int(match[4], 16),
                device=devices.setdefault(device, device),
                inode=int(match[7]),
                path=path,
            )
        )
    return tuple(mappings)


def backing_of(mapping: MemoryMapping, page_size: int = PAGE_SIZE) -> BackingKind:
    """Return the kind of memory behind a mapping.

    :param page_size: The page size of the backing in bytes, which the monitor reports
        (:attr:`MemorySection.page_size`). This parameter is necessary because the path of a memfd
        or a file does not show whether the file has huge pages.
    """
    path = mapping.path.removesuffix(" (deleted)")
    # An anonymous MAP_HUGETLB mapping is also a file with this name (fs/hugetlbfs/inode.c).
    if page_size > PAGE_SIZE or path.startswith(("/anon_hugepage", "/dev/hugepages/")):
        return "hugetlb"
    if mapping.inode == 0:
        return "anonymous"
    if path.startswith("/memfd:"):
        return "memfd"
    # This is a name in /proc/PID/maps, not a file that the tool opens.
    if path.startswith(("/dev/shm/", "/dev/zero", "/SYSV")):  # nosec B108
        return "shmem"
    if path.startswith("/dev/"):
        return "device"
    return "file"


def mappings_of(maps: Sequence[MemoryMapping], start: int, size: int) -> tuple[MemoryMapping, ...]:
    """Return the mappings that together cover ``start..start+size-1`` without a gap.

    :raises FailedError: If a byte of this range is not mapped (code ``unmapped``).
    """
    found = tuple(m for m in maps if m.start < start + size and m.end > start)
    reached = start
    for mapping in found:
        if mapping.start > reached:
            break
        reached = mapping.end
    if reached < start + size:
        raise FailedError(
            f"QEMU has no mapping at {reached:#x}, although its monitor reports guest RAM at this "
            "address",
            "run qemu-prefault again, because the memory layout may have changed",
            code=Code.UNMAPPED,
        )
    return found


def thread_names(process: Process | int) -> dict[int, str]:
    """Return the names of a process's threads, by thread id.

    The result is empty if the process has exited.

    :param process: The process or its pid. A pid may have been reused.
    """
    if isinstance(process, int):
        process = Process(process, 0)
    names = {}
    with contextlib.suppress(OSError, QemuPrefaultError):
        for tid in process.threads():
            name = read_optional(f"{process.proc}/task/{tid}/comm")
            if name is not None:
                names[tid] = name.rstrip("\n")
    return names


def _list_threads(process: Process, list_tasks: Callable[[], list[str]]) -> list[str]:
    """Return the ids of all threads of a process.

    The function reads the kernel's list until the list is complete, at most :data:`MOST_LISTINGS`
    times. The list can omit a live thread if another thread exits during the read. The kernel finds
    its position in the list by counting threads. It counts the exiting thread even if it does not
    list this thread (proc_task_readdir(), first_tid() and next_tid(), fs/proc/base.c).

    While an exiting thread is preempted inside __unhash_process() (kernel/exit.c), every list omits
    a live thread in this way. During this time, ``Threads:`` in /proc/PID/status no longer counts
    the exiting thread, and a lookup of this thread's id fails.

    Therefore the function reads the number of threads after it has read the list. The list is
    complete if at least this number of the listed threads still exist.
    """
    found: list[str] = []
    for _ in range(MOST_LISTINGS):
        listed = list_tasks()
        count = _count_threads(process)
        found = [tid for tid in listed if os.path.exists(f"{process.proc}/task/{tid}/comm")]
        if len(found) >= count:
            break
    return found


def _count_threads(process: Process) -> int:
    match = re.search(r"^Threads:\s+([0-9]{1,9})$", process.read("status"), re.M)
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Process:
    """A process on this host.

    :meth:`find` creates an object that is pinned: all reads go through the descriptors in ``pin``,
    and fail if the process has exited, even if the kernel has reused its pid. An object without
    these descriptors reads ``/proc/PID`` by its path.

    :ivar traits: The traits of the process when :meth:`find` was called, see
        :meth:`check_unchanged`.
    """

    pid: int
    start_time: int
    pin: Pin | None = field(default=None, compare=False, repr=False)
    traits: Traits | None = field(default=None, compare=False, repr=False)

    @classmethod
    def find(cls, pid: int) -> Process:
        """Return the process with this id, and pin it.

        :raises GoneError: If no such process exists.
        """
        path = f"{PROC}/{pid}"
        try:
            pin = Pin(path, pid)
        except OSError as error:
            raise read_error(error, path, pid) from error
        pinned = cls(pid, 0, pin)
        start_time = parse_start_time(pinned.read("stat"))
        return cls(pid, start_time, pin, pinned._read_traits())

    @property
    def proc(self) -> str:
        """The path of the process's directory in /proc, which is valid while this object exists.

        If the process is pinned, the path goes through the open directory.
        """
        return f"{PROC}/{self.pid}" if self.pin is None else self.pin.path

    def read(self, name: str) -> str:
        """Return the text of a file in the process's directory.

        :raises GoneError: If the process has exited.
        :raises QemuPrefaultError: If the file cannot be read for another reason. See
            :func:`read_file`.
        """
        return self.read_content(name).decode("utf-8", "surrogateescape")

    def read_content(self, name: str) -> bytes:
        """Return the content of a file in the process's directory.

        The errors are those of :meth:`read`.
        """
        shown = None if self.pin is None else f"{PROC}/{self.pid}/{name}"
        return read_file_bytes(f"{self.proc}/{name}", self.pid, shown)

    def check(self) -> None:
        """Check that the process is alive, and that its pid has not been reused.

        :raises GoneError: If the process has exited, or if it is a zombie.
        """
        text = self.read("stat")
        state = text[text.rfind(")") + 1 :].split()[:1]
        if parse_start_time(text) != self.start_time or state in (["Z"], ["X"]):
            raise gone(self.pid)

    def check_unchanged(self) -> None:
        """Check that the process still runs the same program as the same user.

        A process can execute a set-user-id program. Code that changes the process must therefore
        call this method first.

        :raises GoneError: If the process has exited, has executed a program or has changed its user
            or group since :meth:`find` was called.
        """
        self.check()
        if self.traits is not None and self._read_traits() != self.traits:
            raise changed(self.pid)

    def _read_traits(self) -> Traits:
        status = self.status()
        return Traits(status.uids, status.gids, program_addresses(self.read("stat")))

    @property
    def exe(self) -> str | None:
        """The path of the executable, or None if this process cannot read the link."""
        return self.link("exe")

    @property
    def name(self) -> str:
        """The command name of the process, which is at most 15 characters long."""
        return self.read("comm").rstrip("\n")

    def arguments(self) -> tuple[str, ...]:
        """Return the command line of the process.

        :raises FailedError: If the command line is longer than the kernel's limit for an ordinary
            program (code ``proc``).
        """
        text = self.read("cmdline")
        if text.count("\0") > MAX_ARGUMENTS:
            shown = f"{PROC}/{self.pid}/cmdline"
            raise beyond_limit(f"{shown} has more than {MAX_ARGUMENTS} arguments")
        return tuple(text.split("\0")[:-1])

    def threads(self) -> tuple[int, ...]:
        """Return the ids of the process's threads, ascending."""
        names = _list_threads(self, lambda: self.listdir("task"))
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def has_thread(self, tid: int) -> bool:
        """Return whether the process has this thread at present."""
        return os.path.exists(f"{self.proc}/task/{tid}/comm")

    def status(self, tid: int | None = None) -> Status:
        """Return the status of the process, or of thread ``tid``."""
        return parse_status(self.read("status" if tid is None else f"task/{tid}/status"))

    def maps(self) -> tuple[MemoryMapping, ...]:
        """Return the memory map of the process."""
        return parse_maps(self.read_content("maps"))

    def thread_syscall(self, tid: int) -> str | None:
        """Return the text of ``/proc/PID/task/TID/syscall``.

        :returns: For example ``202 0x… …`` or ``running``. None if the file cannot be read, because
            this process lacks CAP_SYS_PTRACE or because the kernel lacks
            CONFIG_HAVE_ARCH_TRACEHOOK.
        """
        text = read_optional(f"{self.proc}/task/{tid}/syscall")
        return None if text is None else text.strip()

    def waits_in(self, tid: int) -> int | None:
        """Return the number of the system call in which a thread waits.

        :returns: None if the thread does not wait, or if this process cannot read this.
        """
        return parse_number((self.thread_syscall(tid) or "").partition(" ")[0])

    def link(self, name: str) -> str | None:
        """Return the target of a link in /proc/PID, or None if the link cannot be read."""
        try:
            return os.readlink(f"{self.proc}/{name}")
        except OSError:
            return None

    def listdir(self, name: str) -> list[str]:
        """Return the entries of a directory in /proc/PID.

        :raises GoneError: If the process has exited.
        :raises UnsupportedError: If this process has no permission to list the directory.
        :raises FailedError: If the directory has too many entries (code ``proc``).
        """
        shown = f"{PROC}/{self.pid}/{name}"
        try:
            return list_bounded(f"{self.proc}/{name}")
        except OSError as error:
            raise read_error(error, shown, self.pid, shown) from error


def parse_number(text: str | None) -> int | None:
    """Return the number in a file's text, or None for other text such as ``max``."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def parse_number_list(text: str, most: int) -> tuple[int, ...]:
    """Return the numbers in a list in the kernel's format, such as ``0-2,5``.

    The result is empty if the text has another format. The kernel prints such a list in ascending
    order (bitmap_list_string(), lib/vsprintf.c).

    :param most: The exclusive upper bound. If a number is not below it, the result is empty.
    """
    found: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if match is None:
            return ()
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= most or (found and first <= found[-1]):
            return ()
        found += range(first, last + 1)
    return tuple(found)


def thread_map(process: Process) -> dict[int, int]:
    """Return the ids of a process's threads in this pid namespace.

    The keys of the result are the thread ids in the process's own pid namespace (NSpid of
    ``/proc/PID/status``). The keys and the values differ if the process runs in another pid
    namespace than qemu-prefault.
    """
    threads = process.threads()
    if len(process.status().ns_pids) <= 1:
        return {tid: tid for tid in threads}
    found = {}
    for tid in threads:
        try:
            found[process.status(tid).ns_pids[-1]] = tid
        except GoneError:  # a worker thread exited in the meantime
            continue
    return found


def tgid_of(tid: int) -> int | None:
    """Return the process id of a thread, or None if the thread does not exist."""
    text = read_optional(f"{PROC}/{tid}/status")
    return None if text is None else parse_status(text).tgid


def comm_of(pid: int) -> str:
    """Return the command name of a process, or ``?`` if it cannot be read."""
    return (read_optional(f"{PROC}/{pid}/comm") or "?").rstrip("\n")
