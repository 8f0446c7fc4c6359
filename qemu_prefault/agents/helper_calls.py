# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that QEMU's seccomp filters allow the system calls of a helper.

A seccomp filter can kill QEMU if QEMU makes a system call that the filter denies. Therefore this
module reads all filters of a thread before qemu-prefault injects code. The module evaluates the
filters for each system call that the injection or the helper makes.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .._native import ffi, lib
from ..errors import Code, FailedError, GoneError, UnsupportedError
from ..host.placement import not_delayed_by_others
from ..host.proc_files import changed
from ..host.procfs import Process
from ..host.ptrace_access import ptrace_denied
from .control_page import AREA_SIZE, CODE_SIZE
from .gadgets import AREAS_FROM
from .qemu_process import SeizeRetry, busy_error, helper_threads, target_of
from .seccomp import BadFilterError, Call, Filter, Number, denied, parse_filters

_T = TypeVar("_T")
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_FLAGS = 0x100022  # MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE
CLONE_FLAGS = 0x3D0F00  # the flags of pthread_create(), see native/ptrace/inject.c
SIG_SETMASK, TICK_SIGNAL = 2, 64
PR_SET_NAME = 15
CLOCK_MONOTONIC = 1
CLOCK_THREAD_CPUTIME_ID = 3
MADV_POPULATE_WRITE = 23
CHUNK = 32 << 20
TIMERS = frozenset({"timer_create", "timer_settime", "timer_delete"})
#: Before this Linux version (commit 3ccbf6f47098), KVM_PRE_FAULT_MEMORY can retry endlessly. On
#: these kernels, a helper that prefaults must have its own timer.
ENDLESS_IOCTL_UNTIL = (6, 18)


@dataclass(frozen=True, slots=True)
class Allowed:
    """The optional system calls that QEMU's seccomp filters allow.

    :ivar timers: Whether the filters allow the helper to create timers, which interrupt its other
        system calls.
    :ivar kill: Whether the filters allow ``kill(PID, 0)``. With this call, the helper checks
        whether qemu-prefault exists.
    """

    timers: bool = True
    kill: bool = True


def required_calls(descriptors: Iterable[int], *, area: int, gadget: int) -> tuple[Call, ...]:
    """Return the system calls that a helper needs.

    :param descriptors: The numbers of QEMU's file descriptors for the vCPUs. A number is -1 if the
        run only populates memory.
    :param area: The address of the helper's mapping in QEMU.
    :param gadget: The address of the ``syscall; ret`` instructions in QEMU.
    """
    control, after = area + CODE_SIZE, gadget + 2
    inside = area + 0x100  # an address in the helper's code
    calls = [
        Call(
            Number.mmap, (area, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_FLAGS, (1 << 64) - 1), after
        ),
        Call(
            Number.mmap,
            (control, AREA_SIZE - CODE_SIZE, PROT_READ | PROT_WRITE, MAP_FLAGS, (1 << 64) - 1),
            after,
        ),
        Call(Number.clone, (CLONE_FLAGS, control, control, control, control), after),
        Call(Number.munmap, (area, AREA_SIZE), after),
        Call(Number.rt_sigreturn, (), after),
        Call(Number.restart_syscall, (), after),
        Call(Number.exit, (area,), after),
        Call(Number.rt_sigprocmask, (SIG_SETMASK, control, 0, 8), inside),
        Call(Number.rt_sigaction, (TICK_SIGNAL, 0, control, 8), inside),
        Call(Number.rt_sigaction, (TICK_SIGNAL, control, 0, 8), inside),
        Call(Number.prctl, (PR_SET_NAME, control), inside),
        Call(Number.set_tid_address, (0,), inside),
        Call(Number.clock_gettime, (CLOCK_MONOTONIC, control), inside),
        Call(Number.clock_gettime, (CLOCK_THREAD_CPUTIME_ID, control), inside),
        Call(Number.nanosleep, (control, 0), inside),
        Call(Number.madvise, (area, CHUNK, MADV_POPULATE_WRITE), inside),
    ]
    calls += [
        Call(Number.ioctl, (descriptor, lib.PREFAULT_IOCTL, control), inside)
        for descriptor in descriptors
        if descriptor >= 0
    ]
    return tuple(calls)


def optional_calls(*, area: int) -> tuple[Call, ...]:
    """Return the system calls that a helper makes only if the filters allow them.

    :param area: The address of the helper's mapping in QEMU.
    """
    control, inside = area + CODE_SIZE, area + 0x100
    return (
        Call(Number.timer_create, (CLOCK_MONOTONIC, control, control), inside),
        Call(Number.timer_settime, (1, 0, control, 0), inside),
        Call(Number.timer_delete, (1,), inside),
        Call(Number.kill, (os.getpid(), 0), inside),
    )


def check_filters(
    process: Process,
    thread_ids: Sequence[int],
    descriptors: Iterable[int] = (),
    *,
    area: int = AREAS_FROM,
    gadget: int = 0,
) -> Allowed:
    """Check that the seccomp filters of threads allow a helper's system calls.

    If a thread has seccomp filters, this function stops the thread briefly to read them.

    :param thread_ids: The ids of the threads.
    :param descriptors: See :func:`required_calls`.
    :param area: See :func:`required_calls`.
    :param gadget: See :func:`required_calls`.
    :returns: The optional system calls that all filters allow.
    :raises UnsupportedError: If a filter denies a required system call, or if this process cannot
        read a filter (code ``seccomp``).
    :raises FailedError: If a thread has exited, or if a thread does not stop.
    """
    descriptors = tuple(descriptors)
    calls = required_calls(descriptors, area=area, gadget=gadget)
    optional = optional_calls(area=area)
    not_allowed: set[str] = set()
    for thread_id in thread_ids:
        status = process.status(thread_id)
        if not status.seccomp:
            continue
        filters = _read_filters(process, thread_id)
        if filters is None:
            if _is_own_sandbox(process, status.seccomp_filters):
                continue
            raise _unreadable(process, status.seccomp_filters)
        names = denied(filters, calls)
        if max(descriptors, default=-1) >= 0 and kernel_version() < ENDLESS_IOCTL_UNTIL:
            names += tuple(name for name in denied(filters, optional) if name in TIMERS)
        if names:
            raise UnsupportedError(
                f"a seccomp filter of QEMU (pid {process.pid}) does not allow {', '.join(names)}",
                "use the plugin agent, or allow these system calls in the filter "
                "(systemd: SystemCallFilter=)",
                code=Code.SECCOMP,
            )
        not_allowed |= set(denied(filters, optional))
    return Allowed(timers=not TIMERS & not_allowed, kill="kill" not in not_allowed)


def kernel_version() -> tuple[int, int]:
    """Return (major, minor) of the running kernel, or (0, 0) if parsing fails."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def seize_denied(result: Any) -> bool:
    """Return whether PTRACE_SEIZE failed with EPERM.

    :param result: The ``struct inject_result`` (native/ptrace/inject_result.h) of a native call.
    """
    return bool(result.stage == lib.INJECT_SEIZE and result.error == errno.EPERM)


def is_changed(result: Any) -> bool:
    """Return whether QEMU is no longer the process that was identified.

    The result is False if only the thread has exited, even if its id belongs to another process.

    :param result: The ``struct inject_result`` (native/ptrace/inject_result.h) of a native call.
    """
    return bool(result.stage == lib.INJECT_IDENTITY and result.error == errno.ESTALE)


def call_with_retries(
    process: Process, thread_id: int, function: Callable[[], _T], result: Any
) -> _T:
    """Call a native function that stops a thread, and retry while the thread is traced.

    :param function: A function that stores its ``struct inject_result`` in ``result``.
    :returns: The result of the last call.
    """
    retry = SeizeRetry(process)
    with not_delayed_by_others(thread_id):
        value = function()
        while seize_denied(result) and retry.is_due():
            time.sleep(0.01)
            value = function()
    return value


def _read_filters(process: Process, thread_id: int) -> list[Filter] | None:
    """Return a thread's seccomp filters, or None if this process cannot read them."""
    buffer = ffi.new("unsigned char[]", lib.FILTERS_BYTES_MAX)
    result = ffi.new("struct inject_result *")
    target = ffi.new("struct pf_target *", target_of(process))
    size = call_with_retries(
        process,
        thread_id,
        lambda: lib.pf_read_filters(target, thread_id, buffer, len(buffer), result),
        result,
    )
    if size >= 0:
        try:
            return list(parse_filters(bytes(ffi.buffer(buffer, size))))
        except BadFilterError:
            return None
    if result.stage == lib.INJECT_FILTERS:
        return None
    if seize_denied(result):
        if helper_threads(process):
            raise busy_error(process)
        raise ptrace_denied(process)
    if is_changed(result):
        raise changed(process.pid)
    if result.error == errno.ESRCH:
        raise GoneError(
            f"thread {thread_id} of QEMU (pid {process.pid}) has exited",
            "check whether QEMU has exited or unplugged the vCPU of this thread",
        )
    raise FailedError(
        f"cannot read the seccomp filters of thread {thread_id} of QEMU (pid {process.pid}), "
        f"because the thread did not stop: {os.strerror(result.error)}",
        "run qemu-prefault again\nQEMU is unchanged",
        code=Code.AGENT,
    )


def has_sandbox(arguments: Sequence[str]) -> bool:
    """Return whether a QEMU command line enables QEMU's own seccomp filter."""
    for option, value in itertools.pairwise(arguments):
        if option in ("-sandbox", "--sandbox") and value.split(",")[0] in ("on", "enable=on"):
            return True
    return False


def _is_own_sandbox(process: Process, filters: int | None) -> bool:
    # seccomp_start() (system/qemu-seccomp.c) loads one filter into all threads. This filter allows
    # all system calls that a helper makes.
    return filters == 1 and has_sandbox(process.arguments())


def _unreadable(process: Process, filters: int | None) -> UnsupportedError:
    which = "seccomp filters" if filters is None or filters != 1 else "a seccomp filter"
    return UnsupportedError(
        f"QEMU (pid {process.pid}) has {which} that this process cannot read",
        "use the plugin agent, or run qemu-prefault on the host as root with CAP_SYS_ADMIN",
        code=Code.SECCOMP,
    )
