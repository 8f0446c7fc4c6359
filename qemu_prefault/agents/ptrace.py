# SPDX-License-Identifier: GPL-2.0-or-later
"""The attach agent: start helper threads inside a running QEMU by ptrace.

This module stops a vCPU thread and makes it execute three system calls, which start a helper thread
and leave the vCPU thread unchanged (native/ptrace/inject.c). After that, the helper and this
process communicate through one control page, which this process accesses through ``/proc/PID/mem``.
If this process's heartbeat stops, the helper finishes its chunk, unmaps itself and exits, so
nothing is left in QEMU if this process is killed. The vCPU thread is the parent of its helper,
which inherits the thread's memory policy. The helper also inherits scheduling class, CPUs and
cgroup; this process sets ordinary ones at once (host/placement.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from signal import SIGUSR1
from typing import Any

from .._native import ffi, lib
from ..errors import AgentError, Code, FailedError, RefusedError, UnsupportedError
from ..host.kernel_log import cause_of_death
from ..host.placement import (
    affinity,
    helper_cpus,
    node_cpus,
    place,
    real_time_cpus,
)
from ..host.procfs import Process, gone, thread_map, thread_names
from ..host.ptrace_access import ptrace_denied
from ..host.stall import STALL_SECONDS, Stall, why_stalled
from ..host.task_limits import RESERVE, strictest, task_limits
from .base import BatchResult, Limits, OrphanCleanup, Outcome, Range, VcpuThread, Worker
from .control_page import AREA_SIZE, CODE_SIZE, Helper, abandoned_areas, offset_of
from .gadgets import Gadgets, find_gadgets, free_areas, prepare_exit_slot
from .helper_calls import Allowed, check_filters
from .ticker import Ticker

#: The helper threads' name, as ``ps -L`` and ``/proc/PID/task/TID/comm`` show it.
HELPER_NAME = "qemu-prefault"

#: Upper limit of helpers per run.
MAX_HELPERS = 8
#: Seconds between two reads of the control pages.
POLL_SHORTEST, POLL_LONGEST = 0.001, 0.25
#: Bytes per second that no host exceeds; the first read of the control pages is timed by it.
FASTEST = 32 << 30


def choose_threads(process: Process, threads: Sequence[VcpuThread]) -> list[VcpuThread]:
    """Choose the vCPUs that get a helper.

    Their number is that of the CPUs that QEMU may use, but at least 2, because a vCPU may be
    unusable (e.g. in guest mode), and at most :data:`MAX_HELPERS`. They are spread over the
    guest's NUMA nodes.

    :raises RefusedError: if QEMU may start too few further threads (code ``no-tasks``).
    """
    try:
        cpus = len(os.sched_getaffinity(process.pid))
    except ProcessLookupError:
        raise gone(process.pid) from None
    wanted = min(len(threads), max(cpus, 2), MAX_HELPERS)
    count, limit = strictest(task_limits(process), wanted)
    if limit is not None and not count:
        raise RefusedError(
            f"QEMU (pid {process.pid}) may start only {limit.left} more threads: "
            f"{limit.name} is {limit.detail}",
            f"raise {limit.name}, or use the plugin agent",
            code=Code.NO_TASKS,
        )
    nodes: dict[int | None, list[VcpuThread]] = {}
    for thread in threads:
        nodes.setdefault(thread.node, []).append(thread)
    rounds = itertools.zip_longest(*nodes.values())
    spread = [thread for round_ in rounds for thread in round_ if thread is not None]
    chosen = {id(thread) for thread in spread[:count]}
    return [thread for thread in threads if id(thread) in chosen]


class PtraceAgent:
    """The :class:`.Agent` that uses helper threads, see the module."""

    name = "attach"
    ranges_per_batch = int(lib.PREFAULT_RANGES_MAX)

    def __init__(
        self, process: Process, threads: Sequence[VcpuThread], limits: Limits | None = None
    ) -> None:
        self.process = process
        self.limits = limits or Limits()
        self.workers = tuple(
            Worker(index, thread.vcpu_id, thread.node) for index, thread in enumerate(threads)
        )
        self._threads = tuple(threads)
        self.warnings: dict[str, str] = {}
        self._helpers: dict[int, Helper] = {}
        self._memory = -1
        self._allowed = Allowed()
        self._ticker: Ticker | None = None
        self._aborted = False
        self._told_to_end = asyncio.Event()
        self._heart: threading.Thread | None = None
        self._heart_stop = threading.Event()

    async def start(self) -> None:
        """Start one helper per vCPU; its thread is stopped for less than 1 ms.

        :raises UnsupportedError: if this process has no permission to trace QEMU, the agent does
            not know QEMU's libc, a security module forbids executable anonymous memory, a seccomp
            filter denies a system call, QEMU's stacks are too small, or QEMU runs with a hardware
            shadow stack.
        :raises RefusedError: if another qemu-prefault is working in this QEMU, or QEMU may not
            start another thread.
        :raises AgentError: if a thread cannot be stopped, or a helper does not start.
        :raises FailedError: if QEMU or a vCPU thread has exited.
        """
        await self._wait_until_alone()
        # For ptrace, the tracer is a thread, and the kernel detaches all its tracees when it
        # exits. So one thread makes all ptrace calls and then exits.
        try:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptrace") as executor:
                await asyncio.get_running_loop().run_in_executor(executor, self._inject_all)
            await self._wait_ready()
            if not self._allowed.timers:
                self._start_ticker()
        except BaseException:
            await self.close()
            raise

    async def _wait_until_alone(self) -> None:
        """Wait until a killed run's helpers have exited; refuse if they do not."""
        deadline = time.monotonic() + self.limits.dead_man + self.limits.stuck + 1
        while helper_threads(self.process.pid):
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"another qemu-prefault is working in QEMU (pid {self.process.pid})",
                    "wait until it is done, then run this again",
                    code=Code.BUSY_AGENT,
                )
            await asyncio.sleep(0.05)

    def _inject_all(self) -> None:
        self._memory = open_memory(self.process)
        maps = self.process.maps()
        gadgets = find_gadgets(self._memory, maps)
        if "shstk" in self.process.status().thread_features:
            raise UnsupportedError(
                f"QEMU (pid {self.process.pid}) runs with a hardware shadow stack",
                "start QEMU with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off, or use the plugin agent",
                code=Code.SHADOW_STACK,
            )
        areas = free_areas(maps, len(self._threads), AREA_SIZE)
        self._allowed = check_filters(
            self.process,
            [thread.thread_id for thread in self._threads],
            [thread.fd for thread in self._threads],
            area=areas[0],
            gadget=gadgets.syscall_ret,
        )
        exit_slot = prepare_exit_slot(self._memory, maps, gadgets)
        request = ffi.new(
            "struct inject_request *",
            {
                "pid": self.process.pid,
                "tid": self._threads[0].thread_id,
                "mem_fd": self._memory,
                "gadgets": {
                    "syscall_ret": gadgets.syscall_ret,
                    "sigreturn": gadgets.sigreturn,
                },
                "area": areas[0],
                "area_size": AREA_SIZE,
                "code_size": CODE_SIZE,
            },
        )
        # Read this before helpers start: they inherit real-time scheduling from their vCPUs.
        main, nodes = affinity(self.process.pid), node_cpus().values()
        real_time = real_time_cpus(self.process)
        placement = [
            helper_cpus(main, affinity(thread.thread_id), nodes, real_time)
            for thread in self._threads
        ]
        for area in abandoned_areas(self.process, self._memory, maps):
            request.area = area
            self._inject(lib.pf_inject_munmap, request)
        for worker, thread, area in zip(self.workers, self._threads, areas, strict=True):
            image = ffi.from_buffer(self._image(area, gadgets, exit_slot, thread))
            request.tid, request.area = thread.thread_id, area
            request.image, request.image_size = image, len(image)
            self._inject(lib.pf_inject_helper, request)
            self._helpers[worker.index] = Helper(self._memory, area, CODE_SIZE)
            self._start_heart()
            self._place(self._helpers[worker.index], placement[worker.index])

    def _place(self, helper: Helper, cpus: Sequence[frozenset[int]]) -> None:
        helper.thread_id = self._thread_of(self._header(helper).tid)
        refused = place(self.process, helper.thread_id, cpus) if helper.thread_id else []
        if refused:
            self.warnings[Code.HELPER_PLACEMENT] = (
                f"a helper runs like its vCPU's thread: no permission to change "
                f"{', '.join(refused)} (this needs CAP_SYS_NICE, and write access to QEMU's "
                "cgroups)"
            )

    def _thread_of(self, own_tid: int) -> int:
        """Return the id in our pid namespace of a thread id in QEMU's; 0 if it does not exist."""
        if same_pid_namespace(self.process.pid):
            return own_tid
        return thread_map(self.process).get(own_tid, 0)

    def _inject(self, function: Any, request: Any) -> None:
        result = ffi.new("struct inject_result *")
        function(request, result)
        self._check(result, request.tid)

    def _image(self, area: int, gadgets: Gadgets, exit_slot: int, thread: VcpuThread) -> bytes:
        """Return the helper's code, followed by the fields of its control page."""
        # timer_create() takes the thread's id in QEMU's own pid namespace.
        own_tid = self.process.status(thread.thread_id).ns_pids[-1]
        control = ffi.new(
            "struct prefault_control *",
            {
                "entry": area,
                "stack_top": area + AREA_SIZE - 16,
                "magic": lib.PREFAULT_CONTROL_MAGIC,
                "area_start": area,
                "area_size": AREA_SIZE,
                "syscall_ret": gadgets.syscall_ret,
                "sigreturn": gadgets.sigreturn,
                "exit_slot": exit_slot,
                "dead_man_ns": int(self.limits.dead_man * 1e9),
                "tick_ns": int(self.limits.tick * 1e9) if self._allowed.timers else 0,
                "kick_ns": int(self.limits.kick * 1e9),
                "limits": {
                    "chunk_bytes": self.limits.chunk_bytes,
                    "stuck_ns": int(self.limits.stuck * 1e9),
                },
                "vcpu_fd": thread.fd,
                "vcpu_tid": own_tid if thread.fd >= 0 else 0,
                "kick_signal": int(SIGUSR1),
                "tool_pid": os.getpid()
                if self._allowed.kill and same_pid_namespace(self.process.pid)
                else 0,
            },
        )
        code = bytes(ffi.buffer(lib.helper_blob)).ljust(CODE_SIZE, b"\xcc")
        return code + bytes(ffi.buffer(control, offset_of("ranges")))

    def _check(self, result: Any, thread_id: int) -> None:
        """Raise the error that matches a failed injection."""
        if result.stage == lib.INJECT_OK:
            return
        what = f"thread {thread_id} of QEMU (pid {self.process.pid})"
        reason = os.strerror(result.error)
        if result.stage == lib.INJECT_SEIZE and result.error == errno.EPERM:
            raise ptrace_denied(self.process)
        if not stays_alive(self.process):
            raise self._died(
                f"QEMU (pid {self.process.pid}) exited while thread {thread_id} started a helper"
            )
        if result.error == errno.ESRCH:
            raise FailedError(
                f"{what} is gone",
                "check whether QEMU has exited or unplugged that vCPU",
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
                f"QEMU (pid {self.process.pid}) cannot map executable anonymous memory: {reason}",
                "a security module forbids it (SELinux: execmem). Allow it for this domain, "
                "or use the plugin agent",
                code=Code.EXECMEM,
            )
        if result.stage == lib.INJECT_CLONE and result.error == errno.EAGAIN:
            _, limit = strictest(task_limits(self.process), MAX_HELPERS + RESERVE)
            raise RefusedError(
                f"QEMU (pid {self.process.pid}) may not start another thread"
                + (f": {limit.name} is {limit.detail}" if limit else f": {reason}"),
                f"raise {limit.name if limit else 'pids.max, or ulimit -u'}, "
                "or use the plugin agent",
                code=Code.NO_TASKS,
            )
        stage = {
            lib.INJECT_SEIZE: "PTRACE_SEIZE failed",
            lib.INJECT_STOP: "the thread did not stop in time",
            lib.INJECT_INSPECT: "the thread's registers or stack are not usable",
            lib.INJECT_WRITE: "the thread's stack could not be written",
            lib.INJECT_RESUME: "the end of the injected system calls could not be observed",
            lib.INJECT_MMAP: "mmap failed in the thread",
            lib.INJECT_IMAGE: "the helper's memory could not be written",
            lib.INJECT_CLONE: "clone failed in the thread",
        }[result.stage]
        raise AgentError(
            f"cannot start a helper from {what}: {stage} ({reason})",
            "QEMU is unharmed; run this again, or use the plugin agent",
        )

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + 5
        for helper in self._helpers.values():
            while not (ready := self._header(helper).ready):
                if time.monotonic() > deadline:
                    raise AgentError(
                        "a helper thread did not start within 5 s",
                        "QEMU is unharmed; the host may be overloaded: run this again",
                    )
                await asyncio.sleep(0.001)
            if ready != 1:
                error = (1 << 32) - ready
                raise AgentError(
                    f"a helper thread could not set its timer: {os.strerror(error)}",
                    "QEMU is unharmed; check QEMU's limit of pending signals (ulimit -i)",
                )

    def _start_ticker(self) -> None:
        helpers = [(h.thread_id, int(self._header(h).tick_signal)) for h in self._helpers.values()]
        self._ticker = Ticker(self.process.pid, helpers, HELPER_NAME, self.limits.tick)

    def _start_heart(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        """Write the heartbeat of every helper, from a thread that nothing else delays."""
        beat = 0
        while True:
            beat += 1
            for helper in list(self._helpers.values()):
                # A helper or QEMU may have exited; run() and close() detect that.
                with contextlib.suppress(OSError):
                    helper.write_word("heartbeat", beat)
            if self._heart_stop.wait(self.limits.dead_man / 10):
                return

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """Run one batch, see :meth:`.Agent.run`.

        :raises FailedError: if QEMU (code ``qemu-gone``) or a helper (code ``agent-left``) is gone.
        """
        if not self._aborted:
            self._told_to_end.clear()
            self._tell_all("abort", 0)
        for index, ranges in batch.items():
            self._guarded(self._helpers[index].submit, ranges)
        finished: dict[int, tuple[Outcome, ...]] = {}
        started, ended = [], []
        begun = time.monotonic()
        left = max((sum(i.size for i in ranges) for ranges in batch.values()), default=0) / FASTEST
        stall = Stall()
        while len(finished) < len(batch):
            await self._wait(min(max(left, POLL_SHORTEST), POLL_LONGEST))
            left = 0.0
            done = 0
            chunks = 0
            for index, ranges in batch.items():
                helper = self._helpers[index]
                outcomes = finished.get(index)
                if outcomes is None:
                    header = self._header(helper)
                    chunks += header.chunk_started_ns
                    outcomes = self._guarded(helper.outcomes, ranges)
                    if header.batch_done == helper.batch:
                        finished[index] = outcomes
                        started.append(header.batch_started_ns)
                        ended.append(header.batch_finished_ns)
                    else:
                        left = max(left, _seconds_left(begun, header, outcomes))
                done += sum(outcome.done for outcome in outcomes)
            on_progress(done)
            if stall.starts((done, chunks)):
                self._report_stall([self._helpers[i] for i in batch if i not in finished])
        seconds = (max(ended) - min(started)) / 1e9 if ended else 0.0
        return BatchResult(finished, seconds)

    def _report_stall(self, helpers: Sequence[Helper]) -> None:
        """Log and record why these helpers make no progress."""
        reasons = {why_stalled(self.process.pid, helper.thread_id) for helper in helpers}
        text = f"no progress for {STALL_SECONDS:g} s: {'; '.join(sorted(reasons))}"
        self.warnings[Code.NO_PROGRESS] = text
        logging.getLogger(__name__).warning(text)

    async def _wait(self, seconds: float) -> None:
        """Wait between two reads; after an abort, only briefly.

        An aborted helper ends its batch after its current chunk, and the guest may be paused.
        """
        if self._told_to_end.is_set():
            await asyncio.sleep(POLL_SHORTEST)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._told_to_end.wait()

    def _header(self, helper: Helper) -> Any:
        return self._guarded(helper.read_header)

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that accesses QEMU's memory.

        If it fails, raise the error for an exited QEMU or an exited helper.
        """
        try:
            return function(*args)
        except (OSError, ValueError) as error:
            if alive(self.process):
                raise AgentError(
                    "a helper thread left QEMU before its work was done",
                    f"this process did not run for {self.limits.dead_man:g} s, because it was "
                    "suspended or the host is overloaded; run it again",
                    code=Code.AGENT_LEFT,
                ) from error
            raise self._died(f"QEMU (pid {self.process.pid}) exited during the prefault") from error

    def _died(self, message: str) -> FailedError:
        """Return the error, with the kernel's reason if the kernel log has one."""
        cause = cause_of_death(self.process)
        return FailedError(
            message + (f": {cause}" if cause else ""),
            "the kernel log has more about this: see dmesg"
            if cause
            else "check QEMU's log and the kernel log (dmesg) for the reason",
            code=Code.QEMU_GONE,
        )

    def abort(self) -> None:
        """See :meth:`.Agent.abort`."""
        self._aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        """See :meth:`.Agent.interrupt`."""
        self._tell_all("abort")
        self._told_to_end.set()

    def _tell_all(self, field: str, value: int = 1) -> None:
        for helper in self._helpers.values():
            with contextlib.suppress(OSError):
                helper.write_word(field, value)

    def orphan_cleanup(self) -> OrphanCleanup:
        """See :meth:`.Agent.orphan_cleanup`."""
        memory, pid = self._memory, self.process.pid
        where = tuple(
            helper.control + offset_of(field)
            for helper in self._helpers.values()
            for field in ("abort", "release")
        )

        def stop_helpers() -> None:
            for address in where:
                with contextlib.suppress(OSError):
                    os.pwrite(memory, (1).to_bytes(4, "little"), address)

        return OrphanCleanup(
            stop_helpers, lambda: not helper_threads(pid), self.limits.stuck + self.limits.dead_man
        )

    async def close(self) -> None:
        """Release the helpers, and wait until all of them have exited.

        :raises AgentError: if a helper is blocked in the kernel. It exits when its system call
            returns.
        """
        self._tell_all("release")
        try:
            await self._wait_gone()
            if self._ticker is not None:
                self._ticker.wait()
                self._ticker = None
        finally:
            self._heart_stop.set()
            if self._heart is not None:
                self._heart.join()
                self._heart = None
            self._helpers.clear()
            if self._memory >= 0:
                os.close(self._memory)
                self._memory = -1

    async def _wait_gone(self) -> None:
        deadline = time.monotonic() + self.limits.stuck + self.limits.dead_man + 2
        pause = 0.0005
        # A helper that was started just before may not have set its name yet.
        while any(helper.is_there() for helper in self._helpers.values()) or (
            self._helpers and helper_threads(self.process.pid)
        ):
            if time.monotonic() > deadline:
                raise AgentError(
                    f"a helper thread in QEMU (pid {self.process.pid}) is blocked in the kernel",
                    "the helper exits when its system call returns; no action is needed",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.02)


def _seconds_left(begun: float, header: Any, outcomes: Sequence[Outcome]) -> float:
    """Return the seconds until the helper's control page should be read again.

    Reads are rare, because this process may share a CPU with the helper.

    :param begun: ``time.monotonic()`` when the batch was submitted.
    :param header: The helper's control page.
    """
    now = time.monotonic()
    done = sum(outcome.done for outcome in outcomes)
    left = sum(outcome.range.size - outcome.done for outcome in outcomes if not outcome.error)
    spent = (header.chunk_started_ns - header.batch_started_ns) / 1e9
    if not done or spent <= 0:
        return now - begun
    wait: float = header.chunk_started_ns / 1e9 + spent * left / done - now
    return wait if done > left else wait * 0.9


def same_pid_namespace(pid: int) -> bool:
    """Return whether process ``pid`` and this process share a pid namespace."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def stays_alive(process: Process, seconds: float = 0.2) -> bool:
    """Return whether the process is alive now and does not exit within ``seconds``.

    A process that is being killed still exists for a moment.
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
    """Return whether the process is alive; a zombie is not."""
    try:
        process.check()
    except FailedError:
        return False
    return True


def helper_threads(pid: int) -> tuple[int, ...]:
    """Return the ids of all runs' helper threads in process ``pid``."""
    return tuple(tid for tid, name in thread_names(pid).items() if name == HELPER_NAME)


def open_memory(process: Process) -> int:
    """Open ``/proc/PID/mem`` for reading and writing.

    :raises UnsupportedError: if this process has no permission to trace QEMU, which this needs.
    :raises FailedError: if QEMU has exited.
    """
    try:
        return os.open(f"/proc/{process.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise ptrace_denied(process) from None
    except (FileNotFoundError, ProcessLookupError):
        raise FailedError(
            f"QEMU (pid {process.pid}) is gone",
            "check QEMU's log for the reason",
            code=Code.QEMU_GONE,
        ) from None
