# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the conformance suite with this kernel's ioctl and with a no-op ioctl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from qemu_prefault.conformance import runner, suite
from qemu_prefault.conformance.host_facts import HostFacts, read_host_facts
from qemu_prefault.conformance.runner import CaseResult
from qemu_prefault.conformance.suite import CaseOutcome
from qemu_prefault.conformance.vmm import IoctlResult, KvmVcpu
from qemu_prefault_lab.conformance import prepared
from support.tool import Tool

pytestmark = pytest.mark.conformance

AreaResults = Callable[[str], list[CaseResult]]
#: The cases that ``make test`` runs with a no-op ioctl: a few fast cases of each kind.
QUICK_MUTATION = ("mapping/4k", "mapping/memfd", "level/", "vcpu/never", "state/cpuid")
AREA_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "mapping": [pytest.mark.every_kernel, pytest.mark.ept],
    "dirty": [pytest.mark.ept],
    "modes": [pytest.mark.ept],
    "slots": [pytest.mark.every_kernel],
    "paging": [pytest.mark.shadow_paging],
}


@pytest.fixture(scope="module", autouse=True)
def this_host(four_kilobyte_pages: None) -> Iterator[HostFacts]:
    """Enable KSM and huge pages of each size, and return this host's properties."""
    with prepared():
        yield read_host_facts()


@pytest.fixture(scope="module")
def results(this_host: HostFacts) -> AreaResults:
    """Return a function that runs an area's cases once and returns their results."""
    found: dict[str, list[CaseResult]] = {}
    cases = suite.all_cases()

    def of(area: str) -> list[CaseResult]:
        if area not in found:
            mine = [case for case in cases if case.area == area]
            found[area] = runner.run(mine, this_host, destructive=True)
        return found[area]

    return of


@pytest.mark.parametrize(
    "area", [pytest.param(area, marks=AREA_MARKS.get(area, ())) for area in suite.AREAS]
)
def test_area(area: str, results: AreaResults) -> None:
    unexpected = [
        f"{result.case.id}: {result.outcome.value}: {result.text}"
        for result in results(area)
        if not result.outcome.expected
    ]
    assert not unexpected, "\n".join(unexpected)


def test_most_cases_run(results: AreaResults, this_host: HostFacts) -> None:
    ran = [
        result
        for area in suite.AREAS
        for result in results(area)
        if result.outcome is not CaseOutcome.SKIP
    ]
    assert len(ran) >= 200
    refused = [result for result in ran if result.outcome is CaseOutcome.REFUSED]
    assert bool(refused) is not this_host.capability


def test_command_line() -> None:
    result = Tool(["conformance", "-k", "errors/einval", "--json"]).finish()
    assert result.status == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["exit"] == 0
    assert report["counts"]["pass"] == len(report["cases"]) == 9
    assert report["host"]["kernel"]

    result = Tool(["conformance", "-k", "control/4k"]).finish()
    assert result.status == 0, result.stdout
    assert "control/4k-read" in result.stdout
    assert "2 cases" in result.stdout


# Check that the suite detects a no-op ioctl. The kernel's own selftest does not detect it
# (tools/testing/selftests/kvm/pre_fault_memory_test.c).


def do_nothing(self: KvmVcpu, gpa: int, size: int, **_: object) -> IoctlResult:
    """Return success without mapping pages."""
    return IoctlResult(error=0, left=0, seconds=0.0)


def failing_share(
    monkeypatch: pytest.MonkeyPatch, this_host: HostFacts, words: tuple[str, ...]
) -> float:
    monkeypatch.setattr(KvmVcpu, "prefault", do_nothing)
    cases = [
        case
        for case in suite.all_cases()
        if case.mapping and case.id.startswith(words) and not case.obstacle(this_host)
    ]
    ran = [
        result
        for result in runner.run(cases, this_host, destructive=True, limit_seconds=40)
        if result.outcome is not CaseOutcome.SKIP
    ]
    kept = [result.case.id for result in ran if result.outcome.expected]
    print(f"{len(ran) - len(kept)} of {len(ran)} cases fail with a no-op ioctl. Passing: {kept}")
    assert len(ran) >= 30
    return (len(ran) - len(kept)) / len(ran)


@pytest.mark.parametrize(
    "words", [QUICK_MUTATION, pytest.param(("",), marks=pytest.mark.full)], ids=["quick", "all"]
)
def test_noop_ioctl_is_detected(
    monkeypatch: pytest.MonkeyPatch, this_host: HostFacts, words: tuple[str, ...]
) -> None:
    if not this_host.capability:
        pytest.skip("this KVM does not offer the ioctl")
    if not this_host.ad_bits:
        pytest.skip("without A/D bits, the guest takes as many faults after a no-op ioctl")
    assert failing_share(monkeypatch, this_host, words) >= 0.9
