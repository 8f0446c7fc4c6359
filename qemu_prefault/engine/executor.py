# SPDX-License-Identifier: GPL-2.0-or-later
"""Populate and prefault memory through an agent, and record the result.

The executor divides ranges among the vCPUs and passes them to an agent in batches. It populates
pages that are not writable yet, and prefaults writable pages. If a vCPU cannot process a range,
another vCPU processes the range. If the time limit expires, the executor returns the remaining
targets to the caller.

This module has one subject, the class :class:`Executor`, so it is longer than 400 lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

from ..agents.base import Agent, Kind, Outcome, Range, Worker
from ..errors import AgentError, Code
from ..host import kvm
from ..host.headroom import Limit
from ..host.memory_source import MemorySource
from ..host.pagemap import Pagemap, Sums
from ..host.reservations import Reservation
from ..host.stall import ProgressLimit
from ..host.unwritten import FileId
from ..qemu.memory_map import MemorySection
from ..units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size
from .plan import Target, partition_by_node
from .tally import RunTally
from .vm import Backing

#: A function that is called with the phase ("populate" or "prefault"), the completed bytes in that
#: phase, and the total bytes of that phase.
Progress = Callable[[str, int, int], None]

#: Errors that depend on the vCPU. Another vCPU may be able to prefault the same range.
VCPU_ERRORS: Final = (kvm.STUCK, errno.EOPNOTSUPP)
#: Populate errors for which a single poisoned or inaccessible page in the range can be the cause.
PAGE_ERRORS: Final = frozenset({errno.EFAULT, kvm.EHWPOISON})
#: Maximum bytes that a worker populates before the executor reads the memory limits again.
BATCH_BYTES: Final = 64 << 20
#: Seconds in which the batches together must complete 1 MiB.
NO_PROGRESS_SECONDS: Final = 5.0
#: Maximum number of faulty pages of a section that are found one by one. The rest of a range with
#: more faulty pages is skipped.
MOST_FAULTY_PAGES: Final = 1024
NO_VCPU: Final = "prefault: no vCPU could be used"


class Backings(Protocol):
    """The interface of an object that returns the backing of a memory section.

    :class:`.Vm` implements this interface.
    """

    def backing(self, section: MemorySection) -> Backing:
        """Return the backing of a section."""
        ...

    def memory_source(self, section: MemorySection) -> MemorySource: ...


class Executor:
    """Populates and prefaults a guest's memory through one agent.

    :ivar agent: The agent, which the caller starts and closes.
    :ivar unusable: A map from the index of a worker to the ioctl's errno. It contains the workers
        whose vCPU cannot be used until the guest has run again.
    """

    def __init__(
        self,
        backings: Backings,
        agent: Agent,
        pagemap: Pagemap,
        tally: RunTally,
        on_progress: Progress,
        *,
        reservation: Reservation,
        check_headroom: bool = True,
    ) -> None:
        """Store the arguments.

        :param reservation: The run's reservation, which :meth:`populate` reduces as it allocates
            memory.
        :param check_headroom: Whether populating stops when little memory is left. ``--force`` sets
            this to False.
        """
        self.agent = agent
        self.unusable: dict[int, int] = {}
        self._backings = backings
        self._pagemap = pagemap
        self._tally = tally
        self._on_progress = on_progress
        self._reservation = reservation
        self._check_headroom = check_headroom
        self._ended = False
        self._time_is_up = False
        #: The number of faulty pages, by the guest-physical address of the section.
        self._faulty: Counter[int] = Counter()
        #: The files that this run populates.
        self._together: set[FileId] = set()
        #: Targets that were entirely writable after populate().
        self._all_writable: set[Target] = set()

    async def populate(self, targets: Sequence[Target], *, only: bool = False) -> None:
        """Make all pages that may be populated present and writable in QEMU.

        The prefault ioctl acts as a read fault. On untouched memory, the ioctl would map the zero
        page read-only (conformance case ``mapping/discarded``). The guest's first write to each
        4 KiB page would still fault.

        :param only: Whether the run only populates. If True, the tally counts the writable bytes
            as completed.
        """
        queues: dict[Target, list[Range]] = {}
        present = {}
        if self._check_headroom:
            self._together = {
                self._backings.memory_source(target.section).file
                for target in targets
                if target.may_populate
            }
        for target in targets:
            if not target.may_populate:
                if only:
                    self._tally.of(target.section).note = target.why_not
                continue
            backing = self._backings.backing(target.section)
            present[target] = self._sums(target).present
            if backing.kind == "hugetlb":  # pagemap does not show whether these are writable
                gaps: Iterable[tuple[int, int]] = [(target.hva, target.size)]
            else:
                gaps = self._pagemap.unwritable(target.hva, target.size, backing.private)
            queues[target] = [Range(Kind.POPULATE, *gap) for gap in gaps]
        outcomes = await self._populate_in_batches(queues)
        for target, before in present.items():
            after = self._sums(target)
            tally = self._tally.of(target.section)
            tally.populated += max(0, after.present - before)
            if after.writable == target.size:
                self._all_writable.add(target)
            if only:
                tally.requested += target.size
                tally.accounted += after.writable
            error = next((o.error for o in outcomes if o.error and _overlaps(o.range, target)), 0)
            if error and error != kvm.ABORTED and tally.note is None:
                tally.note = f"populate: {kvm.describe_errno(error)}"

    async def _populate_in_batches(self, queues: dict[Target, list[Range]]) -> list[Outcome]:
        """Populate ranges in batches, and read the memory limits before each batch.

        Other runs and other guests allocate memory at the same time. Therefore a batch allocates at
        most :attr:`.Limit.per_batch` bytes from each limit. If this number is less than a huge
        page, the method stops populating the targets to which the limit applies.
        """
        total = sum(item.size for queue in queues.values() for item in queue)
        outcomes: list[Outcome] = []
        while any(queues.values()) and not self._ended and not self._time_is_up:
            batch, taken = self._next_batch(queues)
            if not batch:
                break
            done = sum(outcome.done for outcome in outcomes)
            found, _ = await self._run(batch, "populate", total, done)
            self._reservation.take(taken)
            outcomes += found
            if any(outcome.error in PAGE_ERRORS for outcome in found):
                done = sum(outcome.done for outcome in outcomes)
                outcomes += await self._populate_around(found, queues, total, done)
            if any(outcome.error == errno.ENOMEM for outcome in found):
                self._warn_if_short(queues)
                break
        self._reservation.release()
        return outcomes

    async def _populate_around(
        self,
        failed: Sequence[Outcome],
        queues: dict[Target, list[Range]],
        total: int,
        done: int,
    ) -> list[Outcome]:
        """Populate the remaining parts of failed ranges, except for the faulty pages.

        If one page of a range is poisoned or inaccessible, the system call for the range fails.
        The method halves the range until only such pages remain, and skips these pages. A
        full file system or huge page pool also causes EFAULT (mm/gup.c, ``faultin_page()``). In
        this case, the method empties the queues and stops populating. :data:`MOST_FAULTY_PAGES`
        limits the search.
        """
        outcomes: list[Outcome] = []
        faulty = self._faulty
        while pending := [o for o in failed if o.error in PAGE_ERRORS and o.left]:
            if self._warn_if_short(queues, forced=True):
                for queue in queues.values():
                    queue.clear()
                break
            halves: list[tuple[int | None, Range]] = []
            for outcome in pending:
                rest = outcome.left or outcome.range
                section = next(t.section for t in queues if _overlaps(rest, t))
                page_size = max(section.page_size, PAGE_SIZE)
                if rest.size <= page_size or faulty[section.gpa] >= MOST_FAULTY_PAGES:
                    faulty[section.gpa] += 1
                    self._tally.of(section).count_skipped(rest.size, outcome.error)
                    continue
                half = max(rest.size // 2 // page_size, 1) * page_size
                halves += [(section.node, item) for item in _take([rest], half)]
                halves.append((section.node, Range(rest.kind, rest.start + half, rest.size - half)))
            failed, _ = await self._run(halves, "populate", total, done)
            outcomes += failed
            done += sum(outcome.done for outcome in failed)
        return outcomes

    def _next_batch(
        self, queues: dict[Target, list[Range]]
    ) -> tuple[list[tuple[int | None, Range]], dict[str, int]]:
        """Remove the next ranges from the queues, and return them.

        :returns: The ranges with their NUMA nodes, and the bytes that they take from each limit.
            Both are empty if too little memory is left.
        """
        batch: list[tuple[int | None, Range]] = []
        taken: dict[str, int] = {}
        for target, queue in queues.items():
            if not queue:
                continue
            left = sum(item.size for item in queue)
            page_size = max(target.section.page_size, PAGE_SIZE)
            budget = min(left, BATCH_BYTES * max(1, len(self.agent.workers)))
            limits = self._limits(target, left)
            for limit in limits:
                budget = limit.fitting(limit.per_batch - taken.get(limit.key, 0), budget)
            if left < page_size:  # another range may have allocated this huge page
                budget = left
            elif budget < left:
                budget = budget // page_size * page_size
            if budget < min(left, max(HUGE_PAGE_SIZE, page_size)):
                self._warn_if_short({target: queue})
                if batch:
                    continue
                queues[target] = []
                continue
            for limit in limits:
                taken[limit.key] = taken.get(limit.key, 0) + limit.need(budget)
            batch += [(target.section.node, item) for item in _take(queue, budget)]
        return batch, taken

    def _limits(self, target: Target, absent: int, *, forced: bool = False) -> list[Limit]:
        if not self._check_headroom and not forced:
            return []
        limits = self._backings.memory_source(target.section).limits(absent, self._together)
        return [limit for limit in limits if self._check_headroom or not limit.unknown]

    def _warn_if_short(self, queues: dict[Target, list[Range]], *, forced: bool = False) -> bool:
        """Record a warning for each memory limit that is too low to continue.

        :param forced: Whether to read the limits even if the caller has disabled the check.
        :returns: Whether a limit is too low.
        """
        short = False
        for target, queue in queues.items():
            left = sum(item.size for item in queue)
            for limit in self._limits(target, left, forced=forced):
                if limit.per_batch < limit.need(
                    min(left, HUGE_PAGE_SIZE)
                ) or limit.available < limit.need(target.section.page_size):
                    why = f"{limit.name} has too little memory left ({limit.detail})"
                    self._tally.warnings[Code.MEMORY_SHORT] = (
                        f"populating ended early, because {limit.unknown or why}; the memory "
                        "populated so far stays populated"
                    )
                    self._tally.of(target.section).note = f"populate: {limit.name} lacks memory"
                    short = True
        return short

    async def prefault(
        self, targets: Sequence[Target], *, again: bool = False, skip_pagemap: bool = False
    ) -> list[Target]:
        """Prefault the writable pages, because KVM would map other pages read-only.

        :param again: Whether a previous call has already counted the targets as requested.
        :param skip_pagemap: Reuse the result of :meth:`populate` instead of reading pagemap again.
            This is valid only if the guest has not run since that call.
        :returns: The targets that were not prefaulted within the limit of :meth:`time_limit`.
        """
        total = sum(target.size for target in targets)
        batch: list[tuple[Range, Target]] = []
        left: list[Target] = []
        finished = 0

        def owner_of(item: Range) -> Target:
            return next(
                target
                for part, target in batch
                if part.start <= item.start < part.start + part.size
            )

        async def flush() -> None:
            nonlocal finished
            ranges = [(target.section.node, item) for item, target in batch]
            outcomes, undone = await self._run(ranges, "prefault", total, finished)
            for outcome in outcomes:
                tally = self._tally.of(owner_of(outcome.range).section)
                tally.prefaulted += outcome.done
                tally.accounted += outcome.done
                finished += outcome.done
                # If a vCPU cannot be used, another vCPU processes the range, or usable() warns.
                if outcome.error and outcome.error not in (kvm.ABORTED, *VCPU_ERRORS):
                    tally.note = f"prefault: {kvm.describe_errno(outcome.error)}"
            left.extend(replace(owner_of(i), gpa=i.start, size=i.size) for i in undone)
            batch.clear()

        limit = self.agent.ranges_per_batch // 2  # partition() may split ranges
        for target in targets:
            tally = self._tally.of(target.section)
            if self._time_is_up:  # the target may not have been populated yet
                left.append(target)
                if not again:
                    requested = target.size if target.may_populate else self._sums(target).writable
                    tally.requested += requested
                continue
            writable = 0
            for start, length in self._writable(target, skip_pagemap):
                gpa = target.gpa + (start - target.hva)
                batch.append((Range(Kind.STAGE2, gpa, length), target))
                writable += length
                if len(batch) >= limit:
                    await flush()
            if not again:
                tally.requested += target.size if target.may_populate else writable
            if target.may_populate and writable < target.size and tally.note is None:
                tally.note = f"{format_size(target.size - writable)} could not be made writable"
            if not target.may_populate:
                tally.note = target.why_not
        if batch:
            await flush()
        if not self.usable():
            for tally in self._tally.tallies.values():
                if tally.accounted < tally.requested:
                    tally.note = tally.note or NO_VCPU
        return left

    def _writable(self, target: Target, skip_pagemap: bool) -> Iterable[tuple[int, int]]:
        if skip_pagemap and target in self._all_writable:
            return [(target.hva, target.size)]
        private = self._backings.backing(target.section).private
        return self._pagemap.writable(target.hva, target.size, private)

    def _sums(self, target: Target) -> Sums:
        private = self._backings.backing(target.section).private
        return self._pagemap.sums(target.hva, target.size, private)

    async def _run(
        self,
        ranges: Sequence[tuple[int | None, Range]],
        phase: str,
        total: int,
        base: int = 0,
    ) -> tuple[list[Outcome], list[Range]]:
        """Process ranges with all usable workers.

        :param ranges: Pairs of a guest NUMA node and a range. The node is None if it is unknown.
        :param base: Bytes that the executor has processed in this phase before this call.
        :returns: The outcomes, and the ranges that were not processed within the time limit.
        """
        outcomes: list[Outcome] = []
        todo = list(ranges)
        most = self.agent.ranges_per_batch
        limit = ProgressLimit(sum(item.size for _, item in todo), NO_PROGRESS_SECONDS)
        completed = 0
        while todo and not self._ended and not self._time_is_up:
            workers = self.usable()
            if not workers:
                break
            shares = partition_by_node(todo, workers)
            done = base + sum(outcome.done for outcome in outcomes)

            def on_progress(more: int, done: int = done) -> None:
                self._on_progress(phase, done + more, total)

            batch = {index: share[:most] for index, share in shares.items() if share}
            result = await self.agent.run(batch, on_progress)
            self._tally.count_work(phase, result.seconds)
            node_of = {worker.index: worker.node for worker in workers}
            todo = [
                (node_of[index], item) for index, share in shares.items() for item in share[most:]
            ]
            for index, items in result.outcomes.items():
                for outcome in items:
                    outcomes.append(outcome)
                    completed += outcome.done
                    if outcome.left is None:
                        continue
                    if self._goes_on(index, outcome):
                        todo.append((node_of[index], outcome.left))
                    else:
                        completed += outcome.left.size
            if len(self.usable()) < len(workers):  # the other workers get the full time
                limit = ProgressLimit(sum(item.size for _, item in todo), NO_PROGRESS_SECONDS)
                completed = 0
            elif todo and not self._time_is_up and limit.exceeded(completed) is not None:
                raise _no_progress(self.agent)
        return outcomes, [item for _, item in todo] if self._time_is_up else []

    def _goes_on(self, index: int, outcome: Outcome) -> bool:
        """Return whether a worker must process the rest of a range."""
        if outcome.range.kind is Kind.STAGE2 and outcome.error in VCPU_ERRORS:
            self.unusable[index] = outcome.error
            return True
        # The time limit interrupted the range, or the batch ended before the range was started.
        return (self._time_is_up and outcome.error == kvm.ABORTED) or not outcome.error

    def usable(self) -> list[Worker]:
        """Return the workers with usable vCPUs, and warn about the other vCPUs."""
        usable = [worker for worker in self.agent.workers if worker.index not in self.unusable]
        if self.unusable:
            names = ", ".join(
                f"vCPU {index} ({kvm.describe_errno(error)})"
                for index, error in sorted(self.unusable.items())
            )
            self._tally.warnings[Code.VCPU_UNUSABLE] = f"could not use {names}" + (
                "" if usable else "; resume the guest briefly, then run qemu-prefault again"
            )
        return usable

    def reconsider_vcpus(self) -> None:
        """Mark all vCPUs as usable again, because the guest has run."""
        self.unusable.clear()
        self._tally.warnings.pop(Code.VCPU_UNUSABLE, None)
        for tally in self._tally.tallies.values():
            if tally.note == NO_VCPU:
                tally.note = None

    @contextlib.contextmanager
    def time_limit(self, seconds: float | None) -> Iterator[None]:
        """Limit the time that populating and prefaulting take in the block.

        When the limit expires, the workers complete their current chunks and start no others.

        :param seconds: The limit in seconds, or None for no limit.
        """

        def end() -> None:
            self._time_is_up = True
            self.agent.interrupt()

        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, end)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._time_is_up = False

    def end(self) -> None:
        """Stop populating and prefaulting permanently after the current chunks."""
        self._ended = True
        self.agent.abort()


def _no_progress(agent: Agent) -> AgentError:
    """Return the error for an agent whose batches end without progress and without an error."""
    return AgentError(
        f"the {agent.name} agent in QEMU ended its batches without processing the memory",
        "run qemu-prefault again, or use another --agent",
    )


def _take(queue: list[Range], size: int) -> list[Range]:
    """Remove ranges of ``size`` bytes in total from a queue, and return them."""
    taken = []
    while queue and size:
        first = queue.pop(0)
        if first.size > size:
            queue.insert(0, Range(first.kind, first.start + size, first.size - size))
            first = Range(first.kind, first.start, size)
        taken.append(first)
        size -= first.size
    return taken


def _overlaps(item: Range, target: Target) -> bool:
    return item.start < target.hva + target.size and target.hva < item.start + item.size
