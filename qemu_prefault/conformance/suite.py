# SPDX-License-Identifier: GPL-2.0-or-later
"""Definition and registry of the cases.

A case is a function that checks one statement about the kernel. The function raises
:class:`~.expectations.Unexpected` if the kernel does not behave as the case states, and
:class:`KnownBad` if the kernel has a known bug. If the behaviour can differ between kernels, the
function returns a description of what it observed. Otherwise it returns None. A case does not check
the kernel's version.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .host_facts import HostFacts

#: The areas of the suite, and the modules of each area.
AREAS = {
    "control": ("control",),
    "mapping": ("memory_kinds", "mapping"),
    "level": ("level",),
    "errors": ("errors",),
    "progress": ("progress",),
    "foreign": ("foreign",),
    "vcpu": ("vcpu", "prefault_vcpu"),
    "parallel": ("parallel",),
    "dirty": ("dirty",),
    "slots": ("slots", "slot_races"),
    "state": ("state",),
    "modes": ("modes",),
    "private": ("private",),
    "paging": ("paging",),
}


class CaseOutcome(Enum):
    """The outcome of a case.

    All outcomes except ``FAIL`` and ``HANG`` are expected.
    """

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
    """The kernel has a known bug, which a later commit fixes."""


class Skip(Exception):
    """The host does not meet a requirement that the case checks while it runs."""


#: A function that returns the reason why a host cannot run a case, or an empty string.
Need = Callable[[HostFacts], str]


@dataclass(frozen=True)
class ConformanceCase:
    """One statement about the kernel, and the function that checks it.

    :ivar id: ``area/name``, which does not change between releases.
    :ivar says: The statement about the kernel, in one sentence.
    :ivar source: The kernel code that causes this behaviour (``file:function()`` and commits).
        Paths without a directory, and those in ``mmu/``, are in ``arch/x86/kvm/``.
    :ivar mapping: True if the case depends on mapped pages, and therefore fails if the ioctl maps
        nothing.
    :ivar destructive: True if the case makes the kernel log a warning, or leak a page until the
        host is rebooted. Such a case runs only with ``--harsh``.
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
        """Return the reason why a host cannot run the case, or an empty string."""
        return next((reason for need in self.needs if (reason := need(host))), "")


#: All registered cases by id.
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
    """Register the ``run`` function as a case."""
    if id in CASES:
        raise ValueError(f"two cases have the id {id}")
    CASES[id] = ConformanceCase(id, says, source, run, mapping, destructive, needs)


def case(
    id: str,
    says: str,
    source: str,
    *needs: Need,
    mapping: bool = False,
    destructive: bool = False,
) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Register the decorated function as a case."""

    def register(run: Callable[[], str | None]) -> Callable[[], str | None]:
        add(id, says, source, run, *needs, mapping=mapping, destructive=destructive)
        return run

    return register


def all_cases() -> list[ConformanceCase]:
    """Return all cases in the order of :data:`AREAS`."""
    for modules in AREAS.values():
        for module in modules:
            importlib.import_module(f"{__package__}.cases.{module}")
    order = list(AREAS)
    return sorted(CASES.values(), key=lambda case: order.index(case.area))
