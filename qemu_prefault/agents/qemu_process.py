# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the attach agent's QEMU process, and open the process's memory."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Any

from ..errors import Code, FailedError, QemuPrefaultError, RefusedError
from ..host.pin import has_exited
from ..host.procfs import Process, thread_names
from ..host.ptrace_access import ptrace_denied

#: The name of the helper threads (``ps -L``, ``/proc/PID/task/TID/comm``).
HELPER_NAME = "qemu-prefault"
#: Seconds to retry while another process traces QEMU. Another qemu-prefault usually traces a thread
#: for less than 1 ms, to start a helper or to read the thread's seccomp filters.
TRACED_SECONDS = 2.0


def same_pid_namespace(process: Process) -> bool:
    """Return whether a process and this process share a pid namespace."""
    theirs = process.link("ns/pid")
    return theirs is not None and theirs == os.readlink("/proc/self/ns/pid")


def target_of(process: Process, memory: int = -1) -> dict[str, Any]:
    """Return the ``struct pf_target`` (native/ptrace/target.h) of a pinned process, for cffi.

    :param memory: The result of :func:`open_memory`, or -1 if the native code does not access the
        process's memory.
    """
    pin, traits = process.pin, process.traits
    return {
        "proc_dir": -1 if pin is None else pin.directory,
        "mem_fd": memory,
        "uids": list(traits.uids) if traits else [],
        "gids": list(traits.gids) if traits else [],
    }


def stays_alive(process: Process, seconds: float = 0.2) -> bool:
    """Return whether the process is alive now and does not exit within ``seconds``.

    A process still exists for a short time while the kernel kills it.
    """
    if process.pin is not None and process.pin.pidfd >= 0:
        return not has_exited(process.pin.pidfd, seconds) and alive(process)
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        return not has_exited(pidfd, seconds) and alive(process)
    finally:
        os.close(pidfd)


def alive(process: Process) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        process.check()
    except FailedError:
        return False
    return True


def helper_threads(process: Process | int) -> tuple[int, ...]:
    """Return the ids of all helper threads in a process.

    The result includes the helpers of other qemu-prefault runs.

    :param process: The process or its pid.
    """
    return tuple(tid for tid, name in thread_names(process).items() if name == HELPER_NAME)


def open_memory(process: Process) -> int:
    """Open QEMU's ``/proc/PID/mem`` for reading and writing.

    The descriptor refers to QEMU's present memory. If QEMU later executes another program, reads
    and writes return 0 bytes (mem_rw(), fs/proc/base.c).

    :raises UnsupportedError: If this process has no permission to trace QEMU. The kernel requires
        this permission for the file.
    :raises FailedError: If QEMU has exited, or if it has executed another program or changed its
        user since it was identified.
    """
    try:
        memory = os.open(f"{process.proc}/mem", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise ptrace_denied(process) from None
    except (FileNotFoundError, ProcessLookupError):
        raise FailedError(
            f"QEMU (pid {process.pid}) has exited",
            "see QEMU's log for the reason",
            code=Code.QEMU_GONE,
        ) from None
    try:
        process.check_unchanged()  # after open(), so that the memory belongs to the checked program
    except BaseException:
        os.close(memory)
        raise
    return memory


def lock_memory(memory: int) -> bool:
    """Try to lock QEMU for this run, and return whether the lock was free.

    A run holds the lock while it starts helpers. An unprivileged user cannot take the lock, because
    opening the file requires the permission to trace QEMU. The kernel releases the lock of a killed
    run. Runs that use different mounts of /proc take different locks.

    :param memory: The result of :func:`open_memory`.
    """
    try:
        fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_memory(memory: int) -> None:
    """Release the lock of :func:`lock_memory`."""
    fcntl.flock(memory, fcntl.LOCK_UN)


def busy_error(process: Process) -> RefusedError:
    """Return the error for a QEMU in which another run works."""
    return RefusedError(
        f"another qemu-prefault is working in QEMU (pid {process.pid})",
        "wait until the other qemu-prefault has finished, then run qemu-prefault again",
        code=Code.BUSY_AGENT,
    )


class SeizeRetry:
    """The retries of a PTRACE_SEIZE that fails with EPERM.

    The reason may be that another process traces the thread (ptrace_attach(), kernel/ptrace.c).
    Opening /proc/PID/mem requires the same permission (proc_mem_open(), fs/proc/base.c), but also
    succeeds if QEMU is traced. Therefore a retry can succeed only if the file can be opened.
    """

    def __init__(self, process: Process, seconds: float = TRACED_SECONDS) -> None:
        self._process = process
        self._deadline = time.monotonic() + seconds

    def is_due(self) -> bool:
        """Return whether to retry.

        The result is False after the deadline, or if this process has no permission to trace QEMU.
        """
        if time.monotonic() > self._deadline:
            return False
        try:
            os.close(open_memory(self._process))
        except QemuPrefaultError:
            return False
        return True
