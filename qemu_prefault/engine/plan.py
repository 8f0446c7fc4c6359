# SPDX-License-Identifier: GPL-2.0-or-later
"""Plan a run with pure functions.

* :func:`select` chooses the memory to prefault, and decides whether this memory may be populated.
* :func:`partition` divides ranges among the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ..errors import InputError
from ..qemu.memory_map import MemorySection
from ..units import HUGE_PAGE_SIZE, PAGE_SIZE
from .options import Options, Populate

if TYPE_CHECKING:
    from ..agents.base import Range, Worker
    from ..qemu.queries import VmState

#: Reasons not to populate memory. :mod:`qemu_prefault.libvirt.prelaunch` also uses these texts.
BALLOON_INFLATED: Final = "the balloon is inflated: the memory in the balloon must stay absent"
SHARED_FILE: Final = "a shared file: populating would write to it"


@dataclass(frozen=True, slots=True)
class Target:
    """A range of guest memory to prefault, which lies within one memory section.

    :ivar gpa: The guest-physical address of the range.
    :ivar size: The size of the range in bytes.
    :ivar may_populate: Whether absent pages may be populated.
    :ivar why_not: The reason why absent pages may not be populated, or None.
    """

    section: MemorySection
    gpa: int
    size: int
    may_populate: bool
    why_not: str | None = None

    @property
    def hva(self) -> int:
        """The virtual address of the target in QEMU."""
        return self.section.hva + (self.gpa - self.section.gpa)


def select(state: VmState, options: Options) -> tuple[Target, ...]:
    """Return the targets to prefault, sorted by guest-physical address.

    :raises InputError: If the chosen ranges contain no guest RAM.
    """
    targets = []
    left = None if options.max_bytes is None else options.max_bytes // PAGE_SIZE * PAGE_SIZE
    for section in sorted(state.sections, key=lambda section: section.gpa):
        if section.skipped is not None:
            continue
        why_not = _reason_not_to_populate(state, section, options.populate)
        for gpa, size in _within(section, options.ranges):
            if left is not None:
                size = min(size, left)  # noqa: PLW2901
                left -= size
            if size:
                targets.append(Target(section, gpa, size, why_not is None, why_not))
    if options.ranges and left != 0 and not targets:
        raise InputError(
            "the specified ranges contain no guest RAM",
            "specify ranges within guest RAM. To show the addresses of RAM, run: qemu-prefault map",
        )
    return tuple(targets)


def subtract(targets: Iterable[Target], done: Iterable[Target]) -> tuple[Target, ...]:
    """Return the parts of the targets that overlap no target in ``done``."""
    left = []
    spans = sorted((target.gpa, target.gpa + target.size) for target in done)
    for target in targets:
        reached, end = target.gpa, target.gpa + target.size
        for low, high in [*spans, (end, end)]:
            if reached < min(low, end):
                left.append(replace(target, gpa=reached, size=min(low, end) - reached))
            reached = max(reached, high)
    return tuple(left)


def _within(section: MemorySection, ranges: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    if not ranges:
        yield section.gpa, section.size
        return
    reached = section.gpa
    for start, size in sorted(ranges):
        low = max(start // PAGE_SIZE * PAGE_SIZE, reached)
        high = min(-(-(start + size) // PAGE_SIZE) * PAGE_SIZE, section.end)
        if low < high:
            yield low, high - low
            reached = high


def _reason_not_to_populate(
    state: VmState, section: MemorySection, populate: Populate
) -> str | None:
    # Two other functions implement this policy with the information that they have. They are
    # _reason_not_to_populate() in libvirt/prelaunch.py and may_populate() in native/plugin/queue.c.
    if populate is Populate.ALL:
        return None
    balloon = state.balloon
    reasons = {
        "--populate resident": populate is Populate.RESIDENT,
        f"{state.private_memory}: private memory is not in QEMU's mapping": state.private_memory
        is not None,
        "virtio-mem: unplugged blocks must stay absent": section.device == "virtio-mem",
        BALLOON_INFLATED: balloon is not None and balloon.actual < balloon.total,
        "reserve=off: the memory is overcommitted": section.reserve is False,
        SHARED_FILE: section.disk_file
        or (section.device in ("nvdimm", "virtio-pmem") and section.share is not False),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def partition(ranges: Sequence[Range], workers: Sequence[Worker]) -> dict[int, list[Range]]:
    """Divide ranges among workers in address order, in parts of about equal size.

    The function cuts ranges at 2 MiB boundaries, so that two workers never process the same huge
    page.
    """
    total = sum(item.size for item in ranges)
    shares: dict[int, list[Range]] = {worker.index: [] for worker in workers}
    position = done = 0
    for item in ranges:
        start, end = item.start, item.start + item.size
        while start < end:
            # Compute the ends of shares from the total. Otherwise rounding up each cut would reduce
            # the last share.
            while (due := total * (position + 1) // len(workers) - done) <= 0:
                position += 1
            cut = min(end, -(-(start + due) // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE)
            shares[workers[position].index].append(type(item)(item.kind, start, cut - start))
            done += cut - start
            start = cut
    return shares


def partition_by_node(
    ranges: Sequence[tuple[int | None, Range]], workers: Sequence[Worker]
) -> dict[int, list[Range]]:
    """Divide the ranges of each guest NUMA node among the node's vCPUs.

    A helper thread has the CPU affinity of its vCPU, and the first access to a page determines the
    page's host node. Therefore the host allocates the memory of a guest node on the host node to
    which the vCPUs of the guest node are pinned. If no worker belongs to a node, the function
    divides the node's ranges among all workers.

    :param ranges: Pairs of a guest NUMA node and a range. The node is None if it is unknown.
    """
    shares: dict[int, list[Range]] = {worker.index: [] for worker in workers}
    by_node: dict[int | None, list[Range]] = {}
    for node, item in ranges:
        by_node.setdefault(node, []).append(item)
    for node, items in by_node.items():
        local = [worker for worker in workers if worker.node == node] if node is not None else []
        for index, share in partition(items, local or workers).items():
            shares[index].extend(share)
    return shares
