# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the QEMU process of a libvirt domain, without calling libvirt."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import Code, FailedError, GoneError
from ..host.proc_files import parse_number
from ..host.procfs import Process

PID_MAX: Final = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h

#: Maximum difference between the age of a process and of its pid file, in seconds.
CLOCK_SECONDS: Final = 5.0
#: struct flock (fcntl(2)) on x86-64.
_FLOCK: Final = struct.Struct("hhqqixxxx")


def pid_files(name: str) -> Iterator[Path]:
    """Yield the paths at which libvirt daemons store the pid file of a domain."""
    if "/" in name or "\0" in name:
        return  # libvirt accepts no such name
    yield Path(f"/run/libvirt/qemu/{name}.pid")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(f"{runtime}/libvirt/qemu/run/{name}.pid")


def find_qemu(name: str, uuid: str) -> Process:
    """Return the QEMU process of a domain.

    :param name: The domain's name.
    :param uuid: The domain's UUID, which QEMU's command line must contain. If the UUID is empty,
        the function does not check the command line.
    :raises FailedError: If no process of this domain was found (code ``no-qemu``).
    """
    problem = "libvirt wrote no pid file"
    for path in pid_files(name):
        try:
            file = _PidFile.read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            continue
        pid = file.pid
        if pid is None or not 0 < pid <= PID_MAX:
            problem = f"{path} contains no process id"
            continue
        try:
            process = Process.find(pid)
            arguments = process.arguments()
        except GoneError:
            problem = f"process {pid} from {path} has exited"
            continue
        if reason := file.problem(process):
            problem = f"{path} contains {pid}, but {reason}"
        elif not uuid or uuid in arguments:
            return process
        else:
            problem = f"process {pid} from {path} does not belong to domain {uuid}"
    raise FailedError(
        f"the QEMU of domain {name} was not found: {problem}",
        "check that the domain is running on this host: virsh domstate DOMAIN",
        code=Code.NO_QEMU,
    )


@dataclass(frozen=True, slots=True)
class _PidFile:
    """The content of a pid file.

    libvirt writes the file in the process that becomes QEMU, and this process keeps a lock on the
    first byte (virPidFileAcquirePath() in virExec(), src/util/vircommand.c, since libvirt 6.2). A
    user who can only read the file cannot take this lock.

    :ivar pid: The process id in the file, or None if the file contains none.
    :ivar holder: The process that has locked the file, or None if no process of this pid namespace
        has.
    :ivar age: The seconds since the file was written.
    """

    pid: int | None
    holder: int | None
    age: float

    @classmethod
    def read(cls, path: Path) -> _PidFile:
        """Read a pid file.

        :raises OSError: If the file cannot be read, or if it is not a regular file.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            pid = parse_number(os.read(descriptor, 64).decode("ascii", "replace"))
            query = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
            kind, *_, holder = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, query))
            locked = kind != fcntl.F_UNLCK and holder > 0
            return cls(pid, holder if locked else None, time.time() - found.st_mtime)
        finally:
            os.close(descriptor)

    def problem(self, process: Process) -> str:
        """Return why the process is not the one that wrote the file, or an empty string."""
        if self.holder is not None:
            return "" if self.holder == process.pid else f"process {self.holder} has locked it"
        # Without a lock, the file may remain from a QEMU that has exited, and its pid may have been
        # reused. Any user can start a process whose command line contains the UUID.
        started = process.start_time / os.sysconf("SC_CLK_TCK")
        if time.clock_gettime(time.CLOCK_BOOTTIME) - started < self.age - CLOCK_SECONDS:
            return "the process is younger than the file"
        return ""
