# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with its threads and status, from ``/proc/PID``.

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
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ..errors import GoneError, QemuPrefaultError
from . import proc_files
from .bounded import list_bounded
from .mappings import MemoryMapping, parse_maps
from .pin import Pin, Traits, program_addresses
from .proc_files import (
    beyond_limit,
    changed,
    gone,
    malformed,
    parse_number,
    read_error,
    read_file_bytes,
    read_optional,
    stat_fields,
)

#: Numbers of system calls, from arch/x86/entry/syscalls/syscall_64.tbl.
NANOSLEEP, FUTEX, CLOCK_NANOSLEEP = 35, 202, 230
#: Maximum number of attempts to list all threads of a process.
MOST_LISTINGS: Final = 16
#: Maximum number of arguments of a process.
MAX_ARGUMENTS: Final = 1 << 16


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
    try:
        return int(stat_fields(text)[19])
    except (IndexError, ValueError) as error:
        raise malformed("/proc/PID/stat", text) from error


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
        path = f"{proc_files.PROC}/{pid}"
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
        return f"{proc_files.PROC}/{self.pid}" if self.pin is None else self.pin.path

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
        shown = None if self.pin is None else f"{proc_files.PROC}/{self.pid}/{name}"
        return read_file_bytes(f"{self.proc}/{name}", self.pid, shown)

    def check(self) -> None:
        """Check that the process is alive, and that its pid has not been reused.

        :raises GoneError: If the process has exited, or if it is a zombie.
        """
        text = self.read("stat")
        if parse_start_time(text) != self.start_time or stat_fields(text)[0] in ("Z", "X"):
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
            shown = f"{proc_files.PROC}/{self.pid}/cmdline"
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
        shown = f"{proc_files.PROC}/{self.pid}/{name}"
        try:
            return list_bounded(f"{self.proc}/{name}")
        except OSError as error:
            raise read_error(error, shown, self.pid, shown) from error


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
    text = read_optional(f"{proc_files.PROC}/{tid}/status")
    return None if text is None else parse_status(text).tgid


def comm_of(pid: int) -> str:
    """Return the command name of a process, or ``?`` if it cannot be read."""
    return (read_optional(f"{proc_files.PROC}/{pid}/comm") or "?").rstrip("\n")
