# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of the agents, which issue system calls inside QEMU.

Only a thread in QEMU's own address space can prefault: KVM checks ``kvm->mm``, and the ioctl fails
with EIO in other processes. Every agent has *workers*, one per vCPU. A worker processes ranges. For
each range, it reports the completed bytes, and the error if one stopped it.
:mod:`qemu_prefault.engine` decides which ranges to process.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import Code, FailedError

MAX_ERRNO: Final = 4095  # include/linux/err.h


class Kind(enum.IntEnum):
    """The operation on a range, with the values of native/common/prefault_loop.h."""

    #: ``madvise(MADV_POPULATE_WRITE)`` on a host virtual address.
    POPULATE = 0
    #: ``KVM_PRE_FAULT_MEMORY`` on a guest-physical address.
    STAGE2 = 1


@dataclass(frozen=True, slots=True)
class Range:
    """A range to process. `start` and `size` are in bytes and page aligned."""

    kind: Kind
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a range: the bytes done from its start, and an errno or 0."""

    range: Range
    done: int
    error: int

    @property
    def left(self) -> Range | None:
        """The rest of the range, or None if all of it is done."""
        if self.done >= self.range.size:
            return None
        return Range(self.range.kind, self.range.start + self.done, self.range.size - self.done)


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread inside QEMU that works for one vCPU of the guest NUMA node `node`."""

    index: int
    vcpu_id: int | None
    node: int | None


@dataclass(frozen=True, slots=True)
class VcpuThread:
    """A vCPU that an agent can use.

    ``fd`` is QEMU's file descriptor of the vCPU, or -1 if the run only populates. ``vcpu_id`` is
    KVM's id of the vCPU (the x86 APIC id), ``qom_path`` and ``index`` are QEMU's path and index.
    """

    thread_id: int
    fd: int
    vcpu_id: int | None
    node: int | None = None
    qom_path: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an agent's work. Times are in seconds."""

    #: Maximum bytes that one system call processes.
    chunk_bytes: int = 32 << 20
    #: Time without progress after which a worker stops processing a range.
    stuck: float = 2.0
    #: Time without this process's heartbeat after which a helper exits.
    dead_man: float = 3.0
    #: Interval at which a helper's timer interrupts the helper's system calls.
    tick: float = 0.1


@dataclass(frozen=True, slots=True)
class OrphanCleanup:
    """The cleanup by :mod:`qemu_prefault.engine.resume_guard` if this process dies.

    ``stop_helpers`` ends the agent's current work, ``helpers_gone`` returns whether the work has
    ended, and ``timeout`` is the longest time to wait for that, in seconds.
    """

    stop_helpers: Callable[[], None]
    helpers_gone: Callable[[], bool]
    timeout: float


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The outcomes of a batch.

    :ivar outcomes: The outcomes of each worker's ranges, by worker index.
    :ivar seconds: The time between the first start and the last end of a worker.
    """

    outcomes: dict[int, tuple[Outcome, ...]]
    seconds: float


def resumed_error() -> FailedError:
    """Return the error for a guest that another client has resumed during the run."""
    return FailedError(
        "another client resumed the guest while it was being prefaulted",
        "run qemu-prefault again to prefault the rest; the memory prefaulted so far stays mapped",
        code=Code.RESUMED,
    )


class Agent(Protocol):
    """The common interface of the attach, plugin and qmp agents.

    The workers exist in QEMU from :meth:`start` to :meth:`close`.
    """

    name: str
    workers: tuple[Worker, ...]
    ranges_per_batch: int

    @property
    def warnings(self) -> Mapping[str, str]:
        """Warnings for the report, by code."""

    async def start(self) -> None:
        """Start the workers."""
        ...

    async def hold_vcpus(self) -> bool:
        """Prevent the workers' vCPUs from running during a prefault.

        Call this when the guest has been paused, before the first batch that prefaults. Then check
        that the guest is still paused. If another client resumes the guest later, the workers'
        batches end before a vCPU runs, and later batches are skipped.

        :returns: Whether that check is necessary. It is not if the vCPUs' threads do the work.
        :raises FailedError: A vCPU is running (code ``resumed``), or cannot be held.
        """
        ...

    async def release_vcpus(self) -> None:
        """Allow the vCPUs to run. Call this before this process resumes the guest."""
        ...

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """Run one batch.

        :param batch: The ranges for each worker, by worker index.
        :param on_progress: A function that is called with the bytes of the batch done so far.
        """
        ...

    def abort(self) -> None:
        """End the current batch after its current chunks, and skip all later batches.

        This is safe to call at any time.
        """
        ...

    def interrupt(self) -> None:
        """End the current batch after its current chunks. Later batches still run."""
        ...

    def orphan_cleanup(self) -> OrphanCleanup:
        """Return the cleanup for a death of this process while the guest is paused."""
        ...

    async def close(self) -> None:
        """Release the workers, and wait until all of them have ended."""
        ...
