# SPDX-License-Identifier: GPL-2.0-or-later
"""What a case is, and the list of all.

A case is a function that returns if the kernel behaves as its line says, and raises
:class:`~.expectations.Unexpected` if not. One whose behaviour legitimately differs between kernels
returns what it saw, as text. Kernels with a known bug are told by the bug itself, under a
timer, never by their version: :class:`KnownBad`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .host_facts import HostFacts

#: The areas of the suite, and the modules of each.
AREAS = {
    "control": ("control",),
    "mapping": ("memory_kinds", "mapping"),
    "level": ("level",),
    "errors": ("errors",),
    "progress": ("progress",),
    "foreign": ("foreign",),
    "vcpu": ("vcpu",),
    "parallel": ("parallel",),
    "dirty": ("dirty",),
    "slots": ("slots", "slot_races"),
    "state": ("state",),
    "modes": ("modes",),
    "private": ("private",),
    "paging": ("paging",),
}


class CaseOutcome(Enum):
    """What a case came to. All but ``FAIL`` and ``HANG`` are as expected."""

    PASS = "pass"
    DIFFERS = "differs"
    REFUSED = "refused"
    KNOWN_BAD = "known bad"
    SKIP = "skip"
    FAIL = "FAIL"
    HANG = "HANG"

    @property
    def expected(self) -> bool:
        return self not in (CaseOutcome.FAIL, CaseOutcome.HANG)


class KnownBad(Exception):
    """The kernel shows a bug that is known, and fixed in later ones."""


class Skip(Exception):
    """The case cannot run here, for a reason found only while it ran."""


Need = Callable[[HostFacts], str]
"""Why a case cannot run on a host; empty if it can."""


_NO_AD_BITS = (
    "EPT without accessed and dirty bits: a prefaulted page faults at its first access all the "
    "same (mmu/spte.c:mark_spte_for_access_track())"
)


@dataclass(frozen=True)
class ConformanceCase:
    """One statement about the kernel.

    :ivar id: ``area/name``, stable.
    :ivar says: the behaviour, in a line.
    :ivar source: where in the kernel it comes from (``file:function``, commits).
    :ivar mapping: its outcome rests on pages being mapped: fails if the ioctl does nothing.
    :ivar destructive: makes the kernel warn, or costs the host a page for good; only when asked
        for.
    """

    id: str
    says: str
    source: str
    run: Callable[[], str | None]
    mapping: bool
    destructive: bool
    needs: tuple[Need, ...]

    @property
    def area(self) -> str:
        return self.id.partition("/")[0]

    def obstacle(self, host: HostFacts) -> str:
        """Why it cannot run on this host; empty if it can."""
        if self.mapping and host.paging == "EPT" and not host.ad_bits:
            return _NO_AD_BITS
        return next((reason for need in self.needs if (reason := need(host))), "")


CASES: dict[str, ConformanceCase] = {}


def add(
    id: str,
    says: str,
    source: str,
    run: Callable[[], str | None],
    *needs: Need,
    mapping: bool = False,
    destructive: bool = False,
) -> None:
    """Register a case; for those made in a loop."""
    if id in CASES:
        raise ValueError(f"two cases are named {id}")
    CASES[id] = ConformanceCase(id, says, source, run, mapping, destructive, needs)


def case(
    id: str,
    says: str,
    source: str,
    *needs: Need,
    mapping: bool = False,
    destructive: bool = False,
) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Register the function below as a case."""

    def register(run: Callable[[], str | None]) -> Callable[[], str | None]:
        add(id, says, source, run, *needs, mapping=mapping, destructive=destructive)
        return run

    return register


def all_cases() -> list[ConformanceCase]:
    """Every case, area by area."""
    for modules in AREAS.values():
        for module in modules:
            importlib.import_module(f"{__package__}.cases.{module}")
    order = list(AREAS)
    return sorted(CASES.values(), key=lambda case: order.index(case.area))
