# SPDX-License-Identifier: GPL-2.0-or-later
"""Start helper threads in QEMU with ptrace.

This module chooses the vCPUs that get a helper and the thread that starts the helpers, checks that
helpers can run in QEMU, and sets the scheduling of each helper. native/ptrace/inject.c makes the
ptrace calls. This module prepares the requests for that code, and converts the results of that code
into exceptions.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .._native import ffi, lib
from ..errors import AgentError, Code, FailedError, GoneError, RefusedError, UnsupportedError
from ..host.cpu_quota import cpu_quota
from ..host.headroom import REMEDY_HIDDEN, hidden_cgroup
from ..host.kernel_log import exit_error
from ..host.placement import (
    REAL_TIME,
    affinity,
    helper_cpus,
    node_cpus,
    place,
    real_time_cpus,
)
from ..host.proc_files import changed, gone, read_optional
from ..host.procfs import CLOCK_NANOSLEEP, FUTEX, NANOSLEEP, Process, thread_map
from ..host.ptrace_access import ptrace_denied
from ..host.task_limits import (
    HELPER_MAPPINGS,
    RESERVE,
    mapping_limits,
    parse_limits,
    strictest,
    task_limits,
)
from .base import Limits, VcpuThread
from .control_page import AREA_SIZE, CODE_SIZE, Helper, abandoned_areas, offset_of
from .gadgets import find_gadgets, free_areas, prepare_exit_slot
from .helper_calls import Allowed, call_with_retries, check_filters, is_changed, seize_denied
from .qemu_process import TRACED_SECONDS, same_pid_namespace, stays_alive, target_of

#: Maximum number of helpers per run.
MAX_HELPERS = 8
#: Seconds in which all injections of a run must begin. Each thread can take almost 2 s to stop.
START_SECONDS = 5.0
#: How long a run waits for an idle thread of QEMU, in seconds, before it uses vCPUs.
IDLE_THREAD_WAIT = 0.1
#: include/uapi/linux/sched.h. Python has no name for this policy.
SCHED_DEADLINE = 6


def choose_threads(
    process: Process,
    threads: Sequence[VcpuThread],
    or_else: str = "use the plugin agent",
    *,
    force: bool = False,
) -> list[VcpuThread]:
    """Return the vCPUs that get a helper thread, or a plugin worker thread.

    The number of helpers is the number of CPUs that QEMU may use, but at least 2 and at most
    :data:`MAX_HELPERS`. The minimum is 2 because one vCPU may be unusable, for example while it
    runs a nested guest. The number is smaller if the guest has fewer vCPUs, or if QEMU's limits on
    tasks, mappings, memory or CPU time allow fewer threads. The function spreads the helpers over
    the guest's NUMA nodes.

    :param or_else: The alternative to raising the limit, for the error message.
    :param force: Whether to start one helper if QEMU's pids cgroup cannot be read.
    :raises RefusedError: If QEMU's limits allow too few additional threads (code ``no-tasks``), or
        if QEMU's pids cgroup cannot be read (code ``hidden-cgroup``).
    """
    try:
        cpus = len(os.sched_getaffinity(process.pid))
    except ProcessLookupError:
        raise gone(process.pid) from None
    wanted = min(len(threads), max(cpus, 2), MAX_HELPERS)
    if (quota := cpu_quota(process)) is not None:
        wanted = min(wanted, quota.helpers)
    if (hidden := hidden_cgroup(process, "pids")) is not None:
        if not force:
            raise RefusedError(
                f"the number of threads that QEMU (pid {process.pid}) may start is unknown: "
                f"{hidden}",
                f"{REMEDY_HIDDEN}. To start one helper thread nevertheless, use --force",
                code=Code.HIDDEN_CGROUP,
            )
        wanted = min(wanted, 1)
    count, limit = strictest(task_limits(process), wanted)
    if limit is not None and not count:
        raise RefusedError(
            limit.cause(process.pid),
            f"{limit.remedy or f'raise {limit.name}'}, or {or_else}",
            code=Code.NO_TASKS,
        )
    nodes: dict[int | None, list[VcpuThread]] = {}
    for thread in threads:
        nodes.setdefault(thread.node, []).append(thread)
    rounds = itertools.zip_longest(*nodes.values())
    spread = [thread for round_ in rounds for thread in round_ if thread is not None]
    chosen = {id(thread) for thread in spread[:count]}
    return [thread for thread in threads if id(thread) in chosen]


def idle_threads(process: Process, threads: Sequence[VcpuThread]) -> Iterator[int]:
    """Yield the threads that can start helpers without stopping a vCPU or QEMU's main loop.

    These threads wait in futex(2) or sleep, and have no real-time priority. Threads that wait in
    futex(2) come first, because their system call is restarted. nanosleep(2) fails with EINTR. The
    first thread is usually QEMU's RCU thread (util/rcu.c), which exists as long as QEMU.
    """
    others = {process.pid, *(thread.thread_id for thread in threads)}
    waits = {tid: process.waits_in(tid) for tid in process.threads() if tid not in others}
    for call in (FUTEX, NANOSLEEP, CLOCK_NANOSLEEP):
        for tid in (tid for tid, number in waits.items() if number == call):
            try:
                if os.sched_getscheduler(tid) & 0xFF not in REAL_TIME:
                    yield tid
            except OSError:  # the thread has exited
                continue


async def check_untraced(process: Process, threads: Sequence[VcpuThread]) -> None:
    """Check that no other process traces the threads that a run would trace.

    The check does not trace QEMU. Another qemu-prefault usually traces a thread for less than 1 ms,
    so the function waits up to :data:`~.qemu_process.TRACED_SECONDS`.

    :param threads: The vCPUs that get a helper thread.
    :raises UnsupportedError: If another process traces one of the threads.
    """
    deadline = time.monotonic() + TRACED_SECONDS
    while any(_is_traced(process, tid) for tid in _traced_in_a_run(process, threads)):
        if time.monotonic() > deadline:
            raise ptrace_denied(process)
        await asyncio.sleep(0.02)


def _traced_in_a_run(process: Process, threads: Sequence[VcpuThread]) -> list[int]:
    """Return the thread that starts helpers, and the vCPUs that the run gate traces."""
    vcpus = [thread.thread_id for thread in threads]
    starter = next(idle_threads(process, threads), None)
    if starter is None:
        return vcpus or [process.pid]
    return [starter, *(thread.thread_id for thread in threads if thread.fd >= 0)]


def _is_traced(process: Process, tid: int) -> bool:
    try:
        return process.status(tid).tracer_pid != 0
    except GoneError:
        return False


class Injector:
    """Starts the helper threads of one run.

    A thread of QEMU starts the helpers. While it is stopped, and while it then waits for a CPU, it
    cannot do anything else. A vCPU with real-time priority that shares its CPU may wait for 100 ms
    after each of several stops. Therefore a vCPU starts a helper only if QEMU has no idle thread.

    The same thread must call the constructor and all methods, because the kernel attaches a tracee
    to one tracer thread and not to a process. The constructor checks that helpers can run in QEMU.
    It writes only one word to QEMU, the exit slot of :func:`.prepare_exit_slot`.

    :ivar allowed: The optional system calls that QEMU's seccomp filters allow.
    :raises UnsupportedError: If a helper cannot run in this QEMU. :meth:`.PtraceAgent.start` lists
        the reasons.
    :raises FailedError: If QEMU has exited.
    """

    def __init__(
        self,
        process: Process,
        memory: int,
        threads: Sequence[VcpuThread],
        limits: Limits,
        deadline: float = math.inf,
    ) -> None:
        """Check that helpers can run in QEMU.

        :param deadline: The time of the monotonic clock in seconds after which no injection begins.
        """
        self._process = process
        self._memory = memory
        self._threads = threads
        self._limits = limits
        self._deadline = deadline
        self._maps = process.maps()
        self._gadgets = find_gadgets(process, memory, self._maps)
        if "shstk" in process.status().thread_features:
            raise UnsupportedError(
                f"QEMU (pid {process.pid}) runs with a hardware shadow stack",
                "start QEMU with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off, or use the plugin agent",
                code=Code.SHADOW_STACK,
            )
        self._areas = free_areas(self._maps, len(threads), AREA_SIZE)
        self._choose_starter()
        self._exit_slot = prepare_exit_slot(memory, self._maps, self._gadgets)
        # Find the CPUs of QEMU's real-time threads before helpers start, because helpers inherit
        # real-time scheduling.
        main, nodes = affinity(process.pid), node_cpus().values()
        real_time = real_time_cpus(process)
        self._cpus = [
            helper_cpus(main, affinity(thread.thread_id), nodes, real_time) for thread in threads
        ]

    def _choose_starter(self) -> None:
        """Choose the thread that starts the helpers, and check its seccomp filters.

        A thread that is running now is usually idle again after some milliseconds.
        """
        deadline = time.monotonic() + IDLE_THREAD_WAIT
        while True:
            for tid in idle_threads(self._process, self._threads):
                with contextlib.suppress(GoneError):  # this thread has exited
                    self.allowed = self._check_filters([tid])
                    self._starter: int | None = tid
                    return
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        self.allowed = self._check_filters([thread.thread_id for thread in self._threads])
        self._starter = None

    def _check_filters(self, thread_ids: Sequence[int]) -> Allowed:
        return check_filters(
            self._process,
            thread_ids,
            [thread.fd for thread in self._threads],
            area=self._areas[0],
            gadget=self._gadgets.syscall_ret,
        )

    def unmap_abandoned_areas(self) -> None:
        """Unmap the memory left in QEMU by qemu-prefault processes that were killed."""
        for area in abandoned_areas(self._process, self._memory, self._maps):
            self._inject(lib.pf_inject_munmap, self._threads[0], area)

    def start_helper(self, index: int) -> Helper:
        """Start the helper of one vCPU.

        :param index: The index of the vCPU in the list of threads that the constructor received.
        :raises AgentError: If the thread cannot be stopped, if it cannot make system calls, or if
            the helpers do not start in time.
        :raises RefusedError: If a limit prevents QEMU from starting another thread.
        :raises UnsupportedError: If this process has no permission to trace QEMU, or if QEMU has no
            permission to map executable memory.
        :raises FailedError: If QEMU or the thread has exited.
        """
        thread, area = self._threads[index], self._areas[index]
        self._inject(lib.pf_inject_helper, thread, area, lambda: self._image(area, thread))
        return Helper(self._memory, area, CODE_SIZE)

    def place(self, index: int, helper: Helper, own_tid: int) -> list[str]:
        """Set a helper's scheduling, CPUs and cgroup.

        :func:`.host.placement.place` describes the new values.

        :param index: The index of the helper's vCPU.
        :param own_tid: The helper's thread id in QEMU's pid namespace.
        :returns: The names of the properties that this process is not allowed to change.
        """
        helper.thread_id = self._thread_of(own_tid)
        if not helper.thread_id:
            return []
        return place(self._process, helper.thread_id, self._cpus[index])

    def _thread_of(self, own_tid: int) -> int:
        """Return a thread's id in this process's pid namespace, or 0 if QEMU has no such thread.

        :param own_tid: The id of the thread in QEMU's pid namespace. It comes from the control
            page, so it may be the id of a thread of another process.
        """
        if same_pid_namespace(self._process):
            return own_tid if self._process.has_thread(own_tid) else 0
        return thread_map(self._process).get(own_tid, 0)

    def _inject(
        self,
        function: Callable[[Any, Any], Any],
        vcpu: VcpuThread,
        area: int,
        make_image: Callable[[], bytes] = bytes,
    ) -> None:
        while True:
            if time.monotonic() > self._deadline:
                raise AgentError(
                    f"QEMU's threads did not start all helper threads within {START_SECONDS:g} s",
                    "run qemu-prefault again when the host is less loaded\nQEMU is unharmed",
                )
            thread_id = self._starter or vcpu.thread_id
            result = self._inject_once(function, thread_id, area, make_image())
            if not self._starter or not _exited_before(result):
                check_injection(self._process, thread_id, result)
                return
            self._choose_starter()

    def _inject_once(
        self, function: Callable[[Any, Any], Any], thread_id: int, area: int, image: bytes
    ) -> Any:
        """Return the ``struct inject_result`` of an injection."""
        image_buffer = ffi.from_buffer(image)
        request = ffi.new(
            "struct inject_request *",
            {
                "target": target_of(self._process, self._memory),
                "tid": thread_id,
                "gadgets": {
                    "syscall_ret": self._gadgets.syscall_ret,
                    "sigreturn": self._gadgets.sigreturn,
                },
                "area": area,
                "area_size": AREA_SIZE,
                "code_size": CODE_SIZE,
                "image": image_buffer,
                "image_size": len(image),
            },
        )
        result = ffi.new("struct inject_result *")
        call_with_retries(self._process, thread_id, lambda: function(request, result), result)
        return result

    def _image(self, area: int, thread: VcpuThread) -> bytes:
        """Return the helper's code, followed by the initial fields of its control page."""
        control = ffi.new(
            "struct prefault_control *",
            {
                "entry": area,
                "stack_top": area + AREA_SIZE - 16,
                "magic": lib.PREFAULT_CONTROL_MAGIC,
                "area_start": area,
                "area_size": AREA_SIZE,
                "syscall_ret": self._gadgets.syscall_ret,
                "sigreturn": self._gadgets.sigreturn,
                "exit_slot": self._exit_slot,
                "dead_man_ns": int(self._limits.dead_man * 1e9),
                "tick_ns": int(self._limits.tick * 1e9) if self.allowed.timers else 0,
                "limits": {
                    "chunk_bytes": self._limits.chunk_bytes,
                    "stuck_ns": int(self._limits.stuck * 1e9),
                },
                "rest_bytes": self._limits.rest_bytes,
                "rest_percent": self._limits.rest_percent,
                "vcpu_fd": thread.fd,
                "tool_pid": os.getpid()
                if self.allowed.kill and same_pid_namespace(self._process)
                else 0,
            },
        )
        code = bytes(ffi.buffer(lib.helper_blob)).ljust(CODE_SIZE, b"\xcc")
        return code + bytes(ffi.buffer(control, offset_of("ranges")))


def _exited_before(result: Any) -> bool:
    """Return whether the thread has exited before the injection changed it."""
    stages = (lib.INJECT_SEIZE, lib.INJECT_STOP, lib.INJECT_IDENTITY)
    return bool(result.stage in stages and result.error == errno.ESRCH)


def _cannot_map(process: Process, what: str, error: int) -> AgentError:
    """Return the error for a thread that cannot map memory for a helper.

    :param error: ENOMEM, or EAGAIN for the limit on locked memory (mm/mmap.c,
        ``mlock_future_ok()``).
    """
    if error == errno.ENOMEM:
        for limit in mapping_limits(process):
            if limit.left <= HELPER_MAPPINGS:
                return AgentError(
                    f"{what} cannot map memory for a helper, because {limit.name} is "
                    f"{limit.detail}",
                    f"{limit.remedy}, or use the plugin agent\nQEMU is unharmed",
                )
    limits = parse_limits(read_optional(f"{process.proc}/limits") or "")
    options = {
        "Max address space": ("--as", errno.ENOMEM),
        "Max data size": ("--data", errno.ENOMEM),
        "Max locked memory": ("--memlock", errno.EAGAIN),
    }
    reached = [
        f"prlimit --pid {process.pid} {option}=unlimited"
        for name, (option, number) in options.items()
        if name in limits and number == error
    ]
    remedy = f"raise QEMU's limits ({', '.join(reached)})" if reached else "run qemu-prefault again"
    return AgentError(
        f"{what} cannot map memory for a helper: {os.strerror(error)}",
        f"{remedy}, or use the plugin agent\nQEMU is unharmed",
    )


def _is_deadline(thread_id: int) -> bool:
    """Return whether a thread has the SCHED_DEADLINE policy (``sched_fork()``)."""
    try:
        return os.sched_getscheduler(thread_id) == SCHED_DEADLINE
    except OSError:
        return False


def check_injection(process: Process, thread_id: int, result: Any) -> None:
    """Raise an error if an injection has failed.

    :param result: The ``struct inject_result`` (native/ptrace/inject_result.h) of the injection.
    """
    if result.stage == lib.INJECT_OK:
        return
    what = f"thread {thread_id} of QEMU (pid {process.pid})"
    reason = os.strerror(result.error)
    if seize_denied(result):
        raise ptrace_denied(process)
    if is_changed(result):
        raise changed(process.pid)
    if not stays_alive(process):
        raise exit_error(
            process, f"QEMU (pid {process.pid}) exited while thread {thread_id} started a helper"
        )
    if result.error == errno.ESRCH:
        raise FailedError(
            f"{what} has exited",
            "check whether QEMU has exited or unplugged the vCPU of this thread",
            code=Code.QEMU_GONE,
        )
    if result.stage == lib.INJECT_INSPECT and result.error == errno.ENOSPC:
        raise UnsupportedError(
            f"{what} has {result.stack_left >> 10} KiB of stack left, but starting a helper "
            f"needs {-(-result.stack_needed // 1024)} KiB",
            "start QEMU with larger stacks (ulimit -s), or use the plugin agent",
            code=Code.SMALL_STACK,
        )
    if result.stage == lib.INJECT_MMAP and result.error in (errno.EACCES, errno.EPERM):
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) cannot map executable anonymous memory: {reason}",
            "use the plugin agent, or allow executable anonymous memory in the security module "
            "(SELinux: execmem)",
            code=Code.EXECMEM,
        )
    if result.stage == lib.INJECT_MMAP and result.error in (errno.ENOMEM, errno.EAGAIN):
        raise _cannot_map(process, what, result.error)
    if result.stage == lib.INJECT_CLONE and _is_deadline(thread_id):
        raise AgentError(
            f"{what} has the SCHED_DEADLINE policy, so it cannot start a thread: {reason}",
            "start QEMU with the reset-on-fork flag (chrt --reset-on-fork --deadline), or use the "
            "plugin agent\nQEMU is unharmed",
        )
    if result.stage == lib.INJECT_CLONE and result.error == errno.EAGAIN:
        _, limit = strictest(task_limits(process), MAX_HELPERS + RESERVE)
        raise RefusedError(
            f"QEMU (pid {process.pid}) cannot start another thread"
            + (f", because {limit.name} is {limit.detail}" if limit else f": {reason}"),
            f"raise {limit.name if limit else 'pids.max or ulimit -u'}, or use the plugin agent",
            code=Code.NO_TASKS,
        )
    stage = {
        lib.INJECT_SEIZE: "PTRACE_SEIZE failed",
        lib.INJECT_STOP: "stopping the thread failed",
        lib.INJECT_IDENTITY: "checking the thread's process failed",
        lib.INJECT_INSPECT: "the thread's registers or stack are not usable",
        lib.INJECT_WRITE: "writing to the thread's stack failed",
        lib.INJECT_RESUME: "waiting for the injected system calls failed",
        lib.INJECT_MMAP: "mmap failed in the thread",
        lib.INJECT_IMAGE: "writing to the helper's memory failed",
        lib.INJECT_CLONE: "clone failed in the thread",
    }[result.stage]
    raise AgentError(
        f"{what} cannot start a helper: {stage} ({reason})",
        "run qemu-prefault again, or use the plugin agent\nQEMU is unharmed",
    )
