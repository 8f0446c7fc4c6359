# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions that convert results to a table and to JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ExitStatus
from .host_facts import HostFacts
from .runner import CaseResult
from .suite import CaseOutcome, ConformanceCase


def exit_status(results: Sequence[CaseResult]) -> ExitStatus:
    if all(result.outcome.expected for result in results):
        return ExitStatus.VERIFIED
    return ExitStatus.FAILED


def to_json(host: HostFacts, results: Sequence[CaseResult], seconds: float) -> dict[str, Any]:
    """Return the results as a JSON object.

    :param seconds: The duration of the run.
    """
    return {
        "schema": 1,
        "host": {**asdict(host), "mode": host.mode},
        "cases": [
            {
                "id": result.case.id,
                "says": result.case.says,
                "source": result.case.source,
                "mapping": result.case.mapping,
                "outcome": result.outcome.value,
                "text": result.text,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
        "counts": counts(results),
        "seconds": round(seconds, 1),
        "exit": int(exit_status(results)),
    }


def counts(results: Sequence[CaseResult]) -> dict[str, int]:
    """Return the number of cases with each outcome."""
    found = Counter(result.outcome for result in results)
    return {outcome.value: found[outcome] for outcome in CaseOutcome}


def header(host: HostFacts) -> Iterator[str]:
    answer = "offered" if host.capability else "not offered"
    yield f"kernel {host.kernel}, {host.mode}: KVM_PRE_FAULT_MEMORY is {answer}"
    yield ""


def line(result: CaseResult) -> str:
    """Return the table row for one result."""
    text = result.text or result.case.says
    return f"{result.outcome.value:9}  {result.case.id:44}  {text}"


def summary(results: Sequence[CaseResult], seconds: float) -> Iterator[str]:
    found = ", ".join(f"{number} {name}" for name, number in counts(results).items() if number)
    yield ""
    yield f"{len(results)} cases in {seconds:.1f} s: {found or 'none'}"
    for result in results:
        if not result.outcome.expected:
            yield f"{result.outcome.value}: {result.case.id}: {result.case.says}"
            yield f"      {result.text}"
            yield f"      see {result.case.source}"


def listing(cases: Sequence[ConformanceCase]) -> Iterator[str]:
    for case in cases:
        yield f"{case.id:44}  {case.says}"
