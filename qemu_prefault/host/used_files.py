# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the files of a file system that processes use, also deleted files.

Processes of root and of QEMU's own user come first, because other users cannot create these.

A process that waits in mmap(2) for the server of a file system holds a lock. A thread that reads
the maps of the process waits for this lock (before Linux 6.17). Therefore a daemon thread reads
them, and the search continues without the process after :data:`PROCESS_SECONDS`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Final

from . import proc_files
from .bounded import list_bounded
from .file_info import FileStatus, file_status
from .proc_files import read_optional
from .procfs import Process

#: Maximum number of other users' processes to examine, and of processes of root and QEMU's user.
MAX_PROCESSES: Final = 4000
MAX_TRUSTED: Final = 16_000
#: Maximum number of files of one process.
MAX_FILES: Final = 65_536
#: How many seconds the search waits for one process, and the whole search.
PROCESS_SECONDS: Final = 3.0
SEARCH_SECONDS: Final = 30.0
#: Maximum number of processes that do not respond within this time.
MAX_STUCK: Final = 16
_BLOCK: Final = 1 << 18
#: The inode of the initial PID namespace (include/linux/proc_ns.h, PROC_PID_INIT_INO).
_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"
_CAP_SYS_PTRACE: Final = 19

#: The inode of a file, its status, and a path at which this process can access it.
_File = tuple[int, FileStatus, str]
#: The result for one process: its files, and whether all of them were examined.
_Result = tuple[list[_File], bool]
#: The threads that wait for a process, by its pid.
_stuck: dict[int, threading.Thread] = {}


def sees_all_processes() -> bool:
    """Return whether no process of this host can be hidden from this process."""
    mine = Process.find(os.getpid())
    return mine.link("ns/pid") == _FIRST_PID_NAMESPACE and mine.status().has_capability(
        _CAP_SYS_PTRACE
    )


class UsedFiles:
    """The search for the files of one file system that processes use.

    :ivar complete: Whether the search has examined all files of all processes that /proc shows.
    """

    def __init__(
        self, process: Process, device: tuple[int, int], *, named_only: bool, descriptors: bool
    ) -> None:
        """Store the arguments.

        :param process: QEMU.
        :param named_only: Whether to examine only other processes with QEMU's name.
        :param descriptors: Whether to examine open files as well as mapped files.
        """
        self.complete = True
        self._process = process
        self._device = device
        self._named_only = named_only
        self._descriptors = descriptors
        self._deadline = time.monotonic() + SEARCH_SECONDS
        self._left = {True: MAX_TRUSTED, False: MAX_PROCESSES}

    def files(self) -> Iterator[_File]:
        """Yield the files. A file can appear more than once."""
        pending = self._processes()
        stuck = 0
        while pending:
            results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
            ended = threading.Event()
            worker = threading.Thread(
                target=self._examine_all, args=(pending, results, ended), daemon=True
            )
            worker.start()
            while pending:
                try:
                    found, complete = results.get(timeout=PROCESS_SECONDS)
                except queue.Empty:
                    self.complete = False
                    _stuck[pending[0][1]] = worker
                    stuck += 1
                    pending = pending[1:] if stuck < MAX_STUCK else []
                    break
                pending = pending[1:]
                self.complete &= complete
                yield from found
            ended.set()

    def _processes(self) -> list[tuple[bool, int]]:
        """Return the processes to examine.

        A process is a pair: whether it belongs to root or to QEMU's user, and its pid. The
        processes of these users are first in the list. Among the others, those with a name of QEMU
        are first.
        """
        found = []
        trusted_users = {0, os.stat(self._process.proc).st_uid}
        for entry in os.listdir(proc_files.PROC):
            pid = int(entry) if entry.isdecimal() else 0
            if not pid or (pid == self._process.pid and self._named_only):
                continue
            if (thread := _stuck.get(pid)) is not None and thread.is_alive():
                self.complete = False
                continue
            _stuck.pop(pid, None)
            with contextlib.suppress(OSError):
                trusted = os.stat(f"{proc_files.PROC}/{pid}").st_uid in trusted_users
                name = read_optional(f"{proc_files.PROC}/{pid}/comm") or ""
                named = "qemu" in name or "kvm" in name
                if named or not self._named_only:
                    found.append((not trusted, not named, pid))
        return [(not untrusted, pid) for untrusted, _, pid in sorted(found)]

    def _examine_all(
        self,
        processes: list[tuple[bool, int]],
        results: queue.SimpleQueue[_Result],
        ended: threading.Event,
    ) -> None:
        """Put one result into the queue for each process, until the search does not wait."""
        for trusted, pid in processes:
            if ended.is_set():
                return
            if self._left[trusted] <= 0 or time.monotonic() > self._deadline:
                results.put(([], False))
                continue
            results.put(self._examine(pid, trusted))

    def _examine(self, pid: int, trusted: bool) -> _Result:
        found: list[_File] = []
        complete = True
        steps = (self._mapped_files, self._open_files)[: 1 + self._descriptors]
        for step in steps:
            try:
                found += step(pid, trusted)
            except OSError as error:
                complete &= error.errno in (errno.ENOENT, errno.ESRCH)  # the process has exited
        return found, complete

    def _mapped_files(self, pid: int, trusted: bool) -> Iterator[_File]:
        """Yield each file of the file system that a process maps.

        A private mapping of a file on tmpfs allocates the file's pages, too (mm/shmem.c,
        ``shmem_fault()``).
        """
        areas = self._areas(pid)
        self._left[trusted] -= areas is not None
        for inode, area in (areas or {}).items():
            path = f"{proc_files.PROC}/{pid}/map_files/{area.decode()}"
            with contextlib.suppress(FileNotFoundError):  # unmapped in the meantime
                yield inode, file_status(path), path

    def _areas(self, pid: int) -> dict[int, bytes] | None:
        """Return an address range of each mapped file, by inode, or None without mappings.

        The function reads blocks, because the file can have any size. Kernel threads have no
        mappings.
        """
        pattern = re.compile(
            rb"^([0-9a-f]+-[0-9a-f]+) [r-][w-][x-][sp] [0-9a-f]+ %02x:%02x ([0-9]+) "
            % self._device,
            re.MULTILINE,
        )
        areas: dict[int, bytes] = {}
        line, empty = b"", True
        fd = os.open(f"{proc_files.PROC}/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while block := os.read(fd, _BLOCK):
                empty = False
                text, _, line = (line + block).rpartition(b"\n")
                for match in pattern.finditer(text + b"\n"):
                    areas[int(match[2])] = match[1]
                if len(areas) > MAX_FILES or time.monotonic() > self._deadline:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        finally:
            os.close(fd)
        return None if empty else areas

    def _open_files(self, pid: int, _trusted: bool) -> Iterator[_File]:
        """Yield each file of the file system that a process has open."""
        proc = f"{proc_files.PROC}/{pid}"
        names = [f"fd/{number}" for number in list_bounded(f"{proc}/fd", MAX_FILES)]
        for name in (*names, "cwd", "root", "exe"):
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                link = os.readlink(f"{proc}/{name}")
                if link.startswith("/") and not link.startswith("/memfd:"):
                    status = file_status(f"{proc}/{name}")
                    if status.device == os.makedev(*self._device):
                        yield status.inode, status, f"{proc}/{name}"
