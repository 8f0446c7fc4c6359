# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep vCPUs out of KVM_RUN while helpers use these vCPUs.

native/ptrace/run_gate.h describes the reason and the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence

from .._native import ffi, lib
from ..errors import AgentError, Code, FailedError
from ..host.proc_files import changed
from ..host.procfs import Process
from ..host.ptrace_access import ptrace_denied
from .base import resumed_error
from .child import end_child
from .control_page import Helper
from .qemu_process import SeizeRetry, target_of

#: Seconds to wait for a reply from the run gate. The gate stops all threads within 5 s, or detaches
#: them within 2 s.
ANSWER_SECONDS = 7.5
#: Seconds to wait for the end of the run gate, which waits up to 5 s for the helpers and then
#: detaches all threads within 2 s.
END_SECONDS = 8.0
ERRNO_BYTES = 4


class RunGate:
    """A child process that traces the vCPU threads while helpers use the vCPUs.

    Before a thread enters KVM_RUN, the child process ends the helpers' work. The child process
    exits when :meth:`close` is called, or when this process exits or is killed.

    :raises AgentError: If the child process cannot be started.
    """

    def __init__(
        self, process: Process, memory: int, thread_ids: Sequence[int], helpers: Sequence[Helper]
    ) -> None:
        """Start the child process.

        :param memory: A file descriptor for QEMU's /proc/PID/mem.
        :param thread_ids: The ids of the vCPU threads.
        :param helpers: The helpers of these threads, in the same order.
        """
        self._process = process
        self._held = False
        vcpus = ffi.new(
            "struct run_gate_vcpu[]",
            [
                {"tid": tid, "control": helper.control}
                for tid, helper in zip(thread_ids, helpers, strict=True)
            ],
        )
        self._socket, gates_end = socket.socketpair()
        with gates_end:
            target = ffi.new("struct pf_target *", target_of(process, memory))
            self._child = lib.pf_run_gate_start(gates_end.fileno(), target, vcpus, len(thread_ids))
        if self._child < 0:
            self._socket.close()
            raise AgentError(
                "cannot start the process that keeps vCPUs out of KVM_RUN: "
                f"{os.strerror(-self._child)}",
                "raise the limits on the number of processes (ulimit -u, pids.max)",
            )
        self._socket.setblocking(False)

    def holds(self) -> bool:
        """Return whether the vCPUs are held and the child process still exists.

        If another client resumes the guest, the child process ends the helpers' work. The result
        remains True in this case, because the helpers no longer use the vCPUs.
        """
        if not self._held:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    async def hold(self) -> None:
        """Trace the vCPU threads, so that no vCPU enters KVM_RUN while its helper works.

        :raises UnsupportedError: If this process has no permission to trace QEMU.
        :raises FailedError: If a vCPU is running (code ``resumed``), if its thread has exited, or
            if QEMU has executed another program.
        :raises AgentError: If a thread does not stop, or if the child process does not reply.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._hold()
        except TimeoutError:
            raise lost_error() from None

    async def _hold(self) -> None:
        retry = SeizeRetry(self._process)
        while (answer := await self._ask(lib.RUN_GATE_HOLD)) == lib.RUN_GATE_FAILED:
            code = int.from_bytes(await self._receive(ERRNO_BYTES), "little")
            if code == errno.EPERM and retry.is_due():
                await asyncio.sleep(0.01)
                continue
            if code == errno.EPERM:
                raise ptrace_denied(self._process)
            if code == errno.ESTALE:
                raise changed(self._process.pid)
            if code == errno.ESRCH:
                raise FailedError(
                    f"a vCPU thread of QEMU (pid {self._process.pid}) has exited",
                    "check whether QEMU has exited or unplugged the vCPU of this thread",
                    code=Code.QEMU_GONE,
                )
            raise AgentError(
                f"a vCPU thread of QEMU (pid {self._process.pid}) does not stop: "
                f"{os.strerror(code)}",
                "run qemu-prefault again\nQEMU is unharmed",
            )
        self._held = True
        if answer == lib.RUN_GATE_OPEN:
            raise resumed_error()

    async def release(self) -> None:
        """Stop tracing the vCPU threads, so that the vCPUs can enter KVM_RUN."""
        if not self._held:
            return
        self._held = False
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while await self._ask(lib.RUN_GATE_RELEASE) != lib.RUN_GATE_RELEASED:
                    pass  # skip the reply for a vCPU that has entered KVM_RUN meanwhile
        except (AgentError, TimeoutError):
            # If the process has exited, the vCPUs can run. Otherwise kill it, see close().
            await self._end_child(0)

    def end(self) -> None:
        """End the child process, so that the vCPUs can enter KVM_RUN.

        A fork of this process may also call this method.
        """
        with contextlib.suppress(OSError):  # the process has exited
            # close() is not enough: forks of this process have copies of the descriptor.
            self._socket.shutdown(socket.SHUT_RDWR)

    async def close(self, seconds: float = END_SECONDS) -> None:
        """End the child process, and wait until it has exited.

        After a time limit, kill the child process. The kernel then detaches the vCPU threads, and
        the threads continue (exit_ptrace(), kernel/ptrace.c). This does not harm QEMU: the child
        process never changes registers, and delivers a thread's signal immediately after it has
        received the signal. When the child process waits for helpers, it has already set
        ``vcpu_runs``, so they end their work after the current chunk.

        :param seconds: The time limit, in seconds.
        """
        self.end()
        self._socket.close()
        await self._end_child(seconds)

    async def _end_child(self, seconds: float) -> None:
        if self._child > 0:
            await end_child(self._child, seconds)
            self._child = 0

    async def _ask(self, command: int) -> int:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self._socket, bytes([command]))
        return (await self._receive(1))[0]

    async def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            try:
                data = await asyncio.get_running_loop().sock_recv(
                    self._socket, size - len(received)
                )
            except OSError:
                raise lost_error() from None
            if not data:
                raise lost_error()
            received += data
        return received


def lost_error() -> AgentError:
    """Return the error for a child process that has exited or does not reply."""
    return AgentError(
        "the child process that keeps the guest's vCPUs out of KVM_RUN exited or did not reply",
        "check the kernel log (dmesg) for the reason, for example the OOM killer, and run "
        "qemu-prefault again\nQEMU is unharmed",
    )
