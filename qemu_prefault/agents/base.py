# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of the agents, which make system calls inside QEMU.

Only a QEMU thread can prefault, because ``kvm_vcpu_ioctl()`` (virt/kvm/kvm_main.c) compares
``kvm->mm`` with the caller's address space. In another process, the KVM_PRE_FAULT_MEMORY ioctl
fails with EIO.

Every agent has *workers*. A worker is a thread inside QEMU that processes memory ranges for one
vCPU. For each range, the worker reports the number of completed bytes. If an error stopped the
worker, the worker also reports this error. :mod:`qemu_prefault.engine` decides which ranges each
worker processes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import Code, FailedError

MAX_ERRNO: Final = 4095  # include/linux/err.h


class Kind(enum.IntEnum):
    """An operation on a memory range.

    native/common/prefault_range.h defines the same values for the workers.
    """

    #: ``madvise(MADV_POPULATE_WRITE)`` on a host virtual address.
    POPULATE = 0
    #: ``KVM_PRE_FAULT_MEMORY`` on a guest-physical address.
    STAGE2 = 1


@dataclass(frozen=True, slots=True)
class Range:
    """A memory range that a worker processes.

    ``start`` is a host virtual address for POPULATE, and a guest-physical address for STAGE2.
    ``size`` is in bytes. Both are page aligned.
    """

    kind: Kind
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of processing one range.

    :ivar range: The range that the worker processed.
    :ivar done: The number of completed bytes, counted from the start of the range.
    :ivar error: The errno of the error that stopped the worker, or 0 if no error occurred.
    """

    range: Range
    done: int
    error: int

    @property
    def left(self) -> Range | None:
        """The part of the range that is not completed, or None if the range is completed."""
        if self.done >= self.range.size:
            return None
        return Range(self.range.kind, self.range.start + self.done, self.range.size - self.done)


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread inside QEMU that processes ranges for one vCPU.

    :ivar index: The index of the worker in its agent, starting at 0.
    :ivar vcpu_id: KVM's id of the vCPU, or None if the run only populates memory.
    :ivar node: The guest NUMA node of the vCPU, or None if the node is unknown.
    """

    index: int
    vcpu_id: int | None
    node: int | None


@dataclass(frozen=True, slots=True)
class VcpuThread:
    """A vCPU that an agent can use, and the vCPU's thread.

    :ivar thread_id: The id of the thread in this process's pid namespace.
    :ivar fd: The number of QEMU's file descriptor for the vCPU, or -1 if the run only populates
        memory.
    :ivar vcpu_id: KVM's id of the vCPU (the x86 APIC id), or None if the run only populates memory.
    :ivar node: The guest NUMA node of the vCPU, or None if the node is unknown.
    :ivar qom_path: QEMU's QOM path of the vCPU.
    :ivar index: QEMU's index of the vCPU.
    """

    thread_id: int
    fd: int
    vcpu_id: int | None
    node: int | None = None
    qom_path: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that an agent applies to its workers.

    Times are in seconds.
    """

    #: Maximum bytes that one system call processes.
    chunk_bytes: int = 32 << 20
    #: Time without progress after which a worker abandons a range.
    stuck: float = 2.0
    #: Time without this process's heartbeat after which a helper exits.
    dead_man: float = 3.0
    #: Interval at which a helper's timer interrupts the helper's system calls.
    tick: float = 0.1
    #: Time for which a helper rests after it has populated a chunk, in percent of the CPU time that
    #: it has used.
    rest_percent: int = 0
    #: Maximum bytes that a helper populates before it rests.
    rest_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class OrphanCleanup:
    """The cleanup that the resume guard performs if this process is killed.

    :mod:`qemu_prefault.engine.resume_guard` implements the resume guard.

    :ivar stop_helpers: A function that stops the agent's helpers.
    :ivar helpers_gone: A function that returns whether the agent's helpers have stopped.
    :ivar timeout: The maximum time to wait until the helpers have stopped, in seconds.
    """

    stop_helpers: Callable[[], None]
    helpers_gone: Callable[[], bool]
    timeout: float


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of one batch of ranges.

    :ivar outcomes: The outcomes of each worker's ranges, by the index of the worker.
    :ivar seconds: The time from the start of the first worker to the end of the last worker, in
        seconds.
    """

    outcomes: dict[int, tuple[Outcome, ...]]
    seconds: float


def resumed_error() -> FailedError:
    """Return the error for a guest that another client has resumed."""
    return FailedError(
        "another client resumed the guest during the prefault",
        "run qemu-prefault again to prefault the memory that is not mapped yet",
        code=Code.RESUMED,
    )


class Agent(Protocol):
    """The common interface of the attach, plugin and qmp agents.

    The workers exist in QEMU from the call to :meth:`start` until :meth:`close` returns.
    """

    name: str
    workers: tuple[Worker, ...]
    ranges_per_batch: int
    #: Whether the workers prefault on the guest's vCPUs, so that the guest must be paused. The
    #: value is known after :meth:`start`.
    needs_pause: bool

    @property
    def warnings(self) -> Mapping[str, str]:
        """The warnings for the run's report, as a map from codes to texts."""

    async def start(self) -> None:
        """Start the workers inside QEMU."""
        ...

    async def hold_vcpus(self) -> bool:
        """Keep the vCPUs out of KVM_RUN while the workers prefault memory.

        The caller must first pause the guest, and must call this method before the first batch that
        prefaults memory. If another client resumes the guest later, every worker ends its batch
        before its vCPU enters KVM_RUN. The agent then skips later batches.

        :returns: Whether the caller must check, after this call, that the guest is still paused.
        :raises FailedError: If a vCPU is running (code ``resumed``), or if the agent cannot keep a
            vCPU out of KVM_RUN.
        """
        ...

    async def release_vcpus(self) -> None:
        """Allow the vCPUs to enter KVM_RUN.

        The caller must call this method before it resumes the guest.
        """
        ...

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """Process one batch of ranges, and return its result.

        :param batch: The ranges for each worker, by the index of the worker.
        :param on_progress: A function that this method calls repeatedly with the number of
            completed bytes of the batch.
        """
        ...

    def abort(self) -> None:
        """End the current batch, and skip all later batches.

        Each worker first completes its current system call. The caller may call this method at any
        time.
        """
        ...

    def interrupt(self) -> None:
        """End the current batch, but process later batches.

        Each worker first completes its current system call.
        """
        ...

    def orphan_cleanup(self) -> OrphanCleanup:
        """Return the cleanup to perform if this process is killed during a pause."""
        ...

    async def close(self) -> None:
        """End the workers, and wait until all of them have ended."""
        ...
