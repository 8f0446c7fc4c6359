# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents: who acts inside QEMU.

Only a thread of QEMU's own address space may prefault (``kvm->mm`` is checked, others get
EIO). Every agent offers the same thing: *workers*, one per vCPU, that take a batch of ranges
each and report per range how many bytes they completed and what stopped them. What to do
where is decided outside, in :mod:`qemu_prefault.engine`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Kind(enum.IntEnum):
    """What a range asks for; the values are those of native/common/prefault_loop.h."""

    POPULATE = 0
    """``madvise(MADV_POPULATE_WRITE)`` on a host virtual address."""
    STAGE2 = 1
    """``KVM_PRE_FAULT_MEMORY`` on a guest physical address."""


@dataclass(frozen=True, slots=True)
class Range:
    """One piece of work: ``start`` and ``size`` in bytes, page aligned."""

    kind: Kind
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a range: bytes done from its start, and the errno that ended it (0: none)."""

    range: Range
    done: int
    error: int

    @property
    def left(self) -> Range | None:
        """The part that was not done, or None."""
        if self.done >= self.range.size:
            return None
        return Range(self.range.kind, self.range.start + self.done, self.range.size - self.done)


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread inside QEMU that acts for one vCPU; ``node`` is the guest's NUMA node."""

    index: int
    vcpu_id: int | None
    node: int | None


@dataclass(frozen=True, slots=True)
class VcpuThread:
    """A vCPU as an agent sees it.

    ``fd`` is QEMU's file descriptor of the vCPU, or -1 where there is nothing to prefault
    (populate only); ``vcpu_id`` is KVM's, the x86 APIC id; ``qom_path`` is QEMU's name of it,
    ``index`` QEMU's number.
    """

    thread_id: int
    fd: int
    vcpu_id: int | None
    node: int | None = None
    qom_path: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of every step; times in seconds."""

    chunk_bytes: int = 32 << 20
    stuck: float = 2.0
    dead_man: float = 3.0
    tick: float = 0.1
    kick: float = 0.5


@dataclass(frozen=True, slots=True)
class OrphanCleanup:
    """What a guard process does when we have died: see :mod:`qemu_prefault.engine.resume_guard`.

    ``stop_helpers`` ends the work under way, ``helpers_gone`` tells whether it has ended, and
    ``timeout`` how many seconds that may take.
    """

    stop_helpers: Callable[[], None]
    helpers_gone: Callable[[], bool]
    timeout: float


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Outcomes per worker, and the seconds from the first start to the last finish."""

    outcomes: dict[int, tuple[Outcome, ...]]
    seconds: float


class Agent(Protocol):
    """The one interface of attach, plugin and qmp. Workers exist between start and close."""

    name: str
    workers: tuple[Worker, ...]
    ranges_per_batch: int
    #: What the operator should know, by code.
    warnings: Mapping[str, str]

    async def start(self) -> None: ...

    async def run(
        self, batch: Mapping[int, Sequence[Range]], on_progress: Callable[[int], None]
    ) -> BatchResult:
        """Run one batch: ranges by worker index. ``on_progress`` gets bytes done so far."""
        ...

    def abort(self) -> None:
        """End the batch under way after its current chunks; safe to call at any time."""
        ...

    def interrupt(self) -> None:
        """Like :meth:`abort`, but for the batch under way only."""
        ...

    def orphan_cleanup(self) -> OrphanCleanup:
        """What is to be done if we die while the guest is paused by us."""
        ...

    async def close(self) -> None:
        """Release the workers and wait until nothing of them is left in QEMU."""
        ...
