# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the attach agent's QEMU process, and open the process's memory."""

from __future__ import annotations

import fcntl
import os
import select
import time

from ..errors import Code, FailedError, QemuPrefaultError, RefusedError
from ..host.kernel_log import cause_of_death
from ..host.procfs import Process, thread_names
from ..host.ptrace_access import ptrace_denied

#: The name of the helper threads (``ps -L``, ``/proc/PID/task/TID/comm``).
HELPER_NAME = "qemu-prefault"
#: Seconds to retry while another process traces QEMU. Another qemu-prefault usually traces a thread
#: for less than 1 ms, to start a helper or to read the thread's seccomp filters.
TRACED_SECONDS = 2.0


def same_pid_namespace(pid: int) -> bool:
    """Return whether process ``pid`` and this process share a pid namespace."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def stays_alive(process: Process, seconds: float = 0.2) -> bool:
    """Return whether the process is alive now and does not exit within ``seconds``.

    A process still exists for a short time while the kernel kills it.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        ended, _, _ = select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)
    return not ended and alive(process)


def alive(process: Process) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        process.check()
    except FailedError:
        return False
    return True


def helper_threads(pid: int) -> tuple[int, ...]:
    """Return the ids of all helper threads in process ``pid``.

    The result includes the helpers of other qemu-prefault runs.
    """
    return tuple(tid for tid, name in thread_names(pid).items() if name == HELPER_NAME)


def open_memory(process: Process) -> int:
    """Open QEMU's ``/proc/PID/mem`` for reading and writing.

    :raises UnsupportedError: If this process has no permission to trace QEMU. The kernel requires
        this permission for the file.
    :raises FailedError: If QEMU has exited.
    """
    try:
        return os.open(f"/proc/{process.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise ptrace_denied(process) from None
    except (FileNotFoundError, ProcessLookupError):
        raise FailedError(
            f"QEMU (pid {process.pid}) has exited",
            "see QEMU's log for the reason",
            code=Code.QEMU_GONE,
        ) from None


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


def exit_error(process: Process, message: str) -> FailedError:
    """Return the error for a QEMU process that has exited.

    If the kernel log contains the reason for the exit, the message ends with the reason.

    :param message: The message without the reason.
    """
    cause = cause_of_death(process)
    return FailedError(
        message + (f": {cause}" if cause else ""),
        "see the kernel log (dmesg) for details"
        if cause
        else "see QEMU's log and the kernel log (dmesg) for the reason",
        code=Code.QEMU_GONE,
    )
