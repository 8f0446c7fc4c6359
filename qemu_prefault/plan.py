# SPDX-License-Identifier: GPL-2.0-or-later
"""Decide, without touching anything: what may be done now, to which memory, by which worker.

Three questions, three pure functions:

* :func:`refuse_unfit` -- is this a moment at which prefaulting helps and harms nothing?
* :func:`select` -- which bytes of which sections, and may they be populated?
* :func:`stripe` -- which worker takes which range?
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from .errors import InputError, RefusedError
from .layout import Section

if TYPE_CHECKING:
    from .agents import Range, Worker
    from .monitor import Machine

PAGE: Final = 4096
HUGE: Final = 2 << 20


class Populate(enum.StrEnum):
    """Which memory may be touched that the guest has not touched yet."""

    AUTO = "auto"
    """All RAM, except where memory is absent on purpose (virtio-mem, balloon, overcommit)."""
    ALL = "all"
    """Everything in the memory slots."""
    RESIDENT = "resident"
    """Nothing new: only what is present and writable is prefaulted."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user asked for.

    ``ranges``: guest-physical (start, size) in bytes; empty: all. ``max_bytes``: stop there,
    lowest addresses first. ``vcpus``: indexes of ``query-cpus-fast``; empty: all.
    ``max_downtime``: seconds a guest may be kept from running at one go; None: as long as it
    takes.
    """

    populate: Populate = Populate.AUTO
    ranges: tuple[tuple[int, int], ...] = ()
    max_bytes: int | None = None
    vcpus: tuple[int, ...] = ()
    populate_only: bool = False
    force: bool = False
    chunk_bytes: int | None = None
    max_downtime: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A piece of one section that is to be prefaulted.

    ``touch``: whether it may be populated; if not, ``why_not`` says why.
    """

    section: Section
    gpa: int
    size: int
    touch: bool
    why_not: str | None = None

    @property
    def hva(self) -> int:
        return self.section.hva + (self.gpa - self.section.gpa)


# -- may we? -----------------------------------------------------------------------------

_UNFIT_STATUS: Final = {
    "inmigrate": (
        "the incoming guest's RAM is not loaded yet",
        "run this with --incoming: it waits until it is; or start QEMU with -S (or send `stop` "
        "now), and run this when query-status says paused",
        "incoming",
    ),
    "postmigrate": (
        "this guest has migrated away; it lives at the destination",
        "prefault it there",
        "migration",
    ),
    "finish-migrate": (
        "this guest is migrating away",
        "prefault it at the destination",
        "migration",
    ),
    "restore-vm": ("a snapshot is being loaded", "run this when that is done", "incoming"),
    "save-vm": ("a snapshot is being saved", "run this when that is done", "migration"),
    "colo": (
        "this guest runs under COLO, which logs dirty pages",
        "stop COLO first",
        "dirty-logging",
    ),
    "internal-error": (
        "KVM reported an internal error for this guest",
        "it cannot go on; reset or restart it first",
        "guest-state",
    ),
    "shutdown": ("this guest has shut down", "start it first", "guest-state"),
    "guest-panicked": ("this guest has panicked", "reset it first", "guest-state"),
}
MIGRATION_OVER: Final = frozenset({"none", "completed", "failed", "cancelled"})
MIGRATED_AWAY: Final = frozenset({"finish-migrate", "postmigrate"})


def refuse_status(status: str) -> None:
    """Raise if a guest of this ``query-status`` cannot run.

    :raises RefusedError: with the reason and what to wait for.
    """
    if status in _UNFIT_STATUS:
        cause, remedy, code = _UNFIT_STATUS[status]
        raise RefusedError(f"{cause} (query-status: {status})", remedy, code=code)


def refuse_unless_incoming(machine: Machine) -> None:
    """Raise if no RAM is about to be loaded.

    :raises RefusedError: with what the guest is doing.
    """
    if machine.status != "inmigrate":
        raise RefusedError(
            f"no migration or restore is awaited here (query-status: {machine.status})",
            "start QEMU with -incoming, and this before the migration; for a guest that is there "
            "already leave --incoming out",
            code="not-incoming",
        )


def refuse_unfit(machine: Machine, dirty_limit: bool = False) -> None:
    """Raise if prefaulting now would hurt the guest, or be in vain.

    While dirty pages are logged, KVM maps by 4 KiB only and marks each page it maps as dirty
    (arch/x86/kvm/mmu/spte.c, ``make_spte()``): a migration would send them all again.

    :param dirty_limit: whether ``query-vcpu-dirty-limit`` shows a limit in force.
    :raises RefusedError: with the reason and what to wait for.
    """
    migration = machine.migration or "none"
    if "postcopy" in migration:
        raise RefusedError(
            f"a postcopy migration is under way (query-migrate: {migration})",
            "wait until it has completed: missing pages must come from the source first",
            code="postcopy",
        )
    refuse_status(machine.status)
    if migration not in MIGRATION_OVER:
        raise RefusedError(
            f"a migration is under way (query-migrate: {migration}): dirty pages are logged",
            "prefault at the destination, after it has completed",
            code="migration",
        )
    if machine.dirty_rate == "measuring" or dirty_limit:
        what = "measured" if machine.dirty_rate == "measuring" else "limited"
        raise RefusedError(
            f"the dirty page rate is being {what}: dirty pages are logged",
            "run this when that is over (query-dirty-rate, query-vcpu-dirty-limit)",
            code="dirty-logging",
        )


# -- what? -------------------------------------------------------------------------------


def select(machine: Machine, policy: Policy) -> tuple[Target, ...]:
    """The pieces of guest RAM to prefault, ascending by guest-physical address.

    :raises InputError: a range touches no RAM.
    """
    targets = []
    left = None if policy.max_bytes is None else policy.max_bytes // PAGE * PAGE
    for section in sorted(machine.sections, key=lambda section: section.gpa):
        if section.skipped is not None:
            continue
        why_not = _why_not_touch(machine, section, policy.populate)
        for gpa, size in _within(section, policy.ranges):
            if left is not None:
                size = min(size, left)  # noqa: PLW2901
                left -= size
            if size:
                targets.append(Target(section, gpa, size, why_not is None, why_not))
    if policy.ranges and left != 0 and not targets:
        raise InputError(
            "no guest RAM lies in the ranges asked for",
            "`qemu-prefault map` shows where it is",
        )
    return tuple(targets)


def without(targets: Iterable[Target], done: Iterable[Target]) -> tuple[Target, ...]:
    """What of the targets lies in none of those that are done."""
    left = []
    spans = sorted((target.gpa, target.gpa + target.size) for target in done)
    for target in targets:
        reached, end = target.gpa, target.gpa + target.size
        for low, high in [*spans, (end, end)]:
            if reached < min(low, end):
                left.append(replace(target, gpa=reached, size=min(low, end) - reached))
            reached = max(reached, high)
    return tuple(left)


def _within(section: Section, ranges: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    if not ranges:
        yield section.gpa, section.size
        return
    reached = section.gpa
    for start, size in sorted(ranges):
        low = max(start // PAGE * PAGE, reached)
        high = min(-(-(start + size) // PAGE) * PAGE, section.end)
        if low < high:
            yield low, high - low
            reached = high


def _why_not_touch(machine: Machine, section: Section, populate: Populate) -> str | None:
    if populate is Populate.ALL:
        return None
    balloon = machine.balloon
    reasons = {
        "--populate resident": populate is Populate.RESIDENT,
        "virtio-mem: unplugged blocks are absent on purpose": section.device == "virtio-mem",
        "the balloon is inflated: memory is absent on purpose": balloon is not None
        and balloon.actual < balloon.total,
        "reserve=off: memory is overcommitted on purpose": section.reserve is False,
        "a shared file: touching it would write it": section.device in ("nvdimm", "virtio-pmem")
        and section.share is not False,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


# -- who? --------------------------------------------------------------------------------


def stripe(ranges: Sequence[Range], workers: Sequence[Worker]) -> dict[int, list[Range]]:
    """Divide ranges among workers, an equal share of bytes each, in address order.

    Cuts fall on 2 MiB boundaries, so that no huge page is worked on from two sides.
    """
    total = sum(item.size for item in ranges)
    shares: dict[int, list[Range]] = {worker.index: [] for worker in workers}
    position = done = 0
    for item in ranges:
        start, end = item.start, item.start + item.size
        while start < end:
            # Shares end at multiples of total/len(workers), so that what one cut adds to a
            # share is not missing from the last one.
            while (due := total * (position + 1) // len(workers) - done) <= 0:
                position += 1
            cut = min(end, -(-(start + due) // HUGE) * HUGE)
            shares[workers[position].index].append(type(item)(item.kind, start, cut - start))
            done += cut - start
            start = cut
    return shares


def stripe_by_node(
    ranges: Sequence[tuple[int | None, Range]], workers: Sequence[Worker]
) -> dict[int, list[Range]]:
    """Like :func:`stripe`, but memory of a guest NUMA node goes to that node's vCPUs.

    A helper has its vCPU's CPU affinity, and first touch decides where memory lies: so it
    comes to lie where the host's pinning meant it to.
    """
    shares: dict[int, list[Range]] = {worker.index: [] for worker in workers}
    by_node: dict[int | None, list[Range]] = {}
    for node, item in ranges:
        by_node.setdefault(node, []).append(item)
    for node, items in by_node.items():
        local = [worker for worker in workers if worker.node == node] if node is not None else []
        for index, share in stripe(items, local or workers).items():
            shares[index].extend(share)
    return shares
