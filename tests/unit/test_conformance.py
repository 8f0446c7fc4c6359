# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the conformance suite handles failing cases and hosts without KVM."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

import pytest
from click.testing import CliRunner, Result

from qemu_prefault.cli.main import cli
from qemu_prefault.conformance import device, host_facts, results, runner, suite
from qemu_prefault.conformance.expectations import Unexpected
from qemu_prefault.conformance.suite import CaseOutcome, ConformanceCase, KnownBad, Skip
from qemu_prefault.errors import ExitStatus

HOST = host_facts.HostFacts(
    kernel="1.2.3", capability=True, refusal=0, paging="NPT", tdp_mmu=True, ad_bits=True,
    vm_types=1, quirks=0, smm=False, dirty_ring=False, gmem_flags=0, nested=False, thp=True,
    hugepages=(0, 0), ksm=False, root=False,
)  # fmt: skip


def outcome(
    run: Callable[[], str | None],
    *needs: Callable[[host_facts.HostFacts], str],
    limit_seconds: float = runner.CASE_LIMIT_SECONDS,
) -> tuple[CaseOutcome, str]:
    case = ConformanceCase("area/name", "what it says", "file:function", run, True, False, needs)
    (result,) = runner.run([case], HOST, limit_seconds=limit_seconds)
    return result.outcome, result.text


def raises(error: Exception) -> Callable[[], NoReturn]:
    def run() -> NoReturn:
        raise error

    return run


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave_a_child() -> None:
    if os.fork() == 0:
        while True:
            signal.pause()


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: None, (CaseOutcome.PASS, "")),
        (lambda: "3 of them", (CaseOutcome.DIFFERS, "3 of them")),
        (raises(Unexpected("2, and not 1")), (CaseOutcome.FAIL, "2, and not 1")),
        (raises(KnownBad("retries forever")), (CaseOutcome.KNOWN_BAD, "retries forever")),
        (raises(Skip("not here")), (CaseOutcome.SKIP, "not here")),
        (crash, (CaseOutcome.FAIL, "the case's process ended with signal 11")),
        (lambda: os._exit(3), (CaseOutcome.FAIL, "the case's process ended with status 3")),
        (leave_a_child, (CaseOutcome.PASS, "")),
    ],
)
def test_outcomes(run: Callable[[], str | None], expected: tuple[CaseOutcome, str]) -> None:
    assert outcome(run) == expected


def test_unexpected_exception_fails_with_its_location() -> None:
    seen, text = outcome(raises(OSError(5, "Input/output error")))
    assert seen is CaseOutcome.FAIL
    assert "OSError: [Errno 5] Input/output error (test_conformance.py:" in text


def test_hung_case_is_reported_and_ended() -> None:
    started = time.monotonic()
    seen, text = outcome(signal.pause, limit_seconds=0.2)
    assert (seen, text) == (CaseOutcome.HANG, "did not end within 0.2 s")
    assert time.monotonic() - started < 10
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_inapplicable_case_is_skipped_with_reason() -> None:
    assert outcome(crash, lambda host: "no such thing") == (CaseOutcome.SKIP, "no such thing")


def test_kernel_warning_case_runs_only_on_request() -> None:
    case = ConformanceCase("area/name", "says", "source", lambda: None, False, True, ())
    assert [each.outcome for each in runner.run([case], HOST)] == [CaseOutcome.SKIP]
    assert [each.outcome for each in runner.run([case], HOST, destructive=True)] == [
        CaseOutcome.PASS
    ]


@pytest.mark.parametrize("bad", [CaseOutcome.FAIL, CaseOutcome.HANG])
def test_exit_status(bad: CaseOutcome) -> None:
    case = ConformanceCase("area/name", "says", "source", lambda: None, False, False, ())
    good = [runner.CaseResult(case, each, "", 0.1) for each in CaseOutcome if each.expected]
    assert results.exit_status(good) == ExitStatus.VERIFIED
    assert results.exit_status([*good, runner.CaseResult(case, bad, "", 0.1)]) == ExitStatus.FAILED


def test_every_case_has_statement_and_source() -> None:
    cases = suite.all_cases()
    assert len(cases) >= 250
    assert {case.area for case in cases} == set(suite.AREAS)
    for case in cases:
        assert case.says and case.source, case.id
        assert case.id == case.id.lower() and " " not in case.id


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["conformance", *arguments])


def test_list_needs_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "kvm_fd", raises(PermissionError(13, "Permission denied")))
    result = run("--list", "-k", "slots/")
    assert result.exit_code == 0
    assert all(line.startswith("slots/") for line in result.output.splitlines())
    assert json.loads(run("--list", "--json").output)["cases"]


def test_no_kvm_exits_4_with_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "kvm_fd", raises(PermissionError(13, "Permission denied")))
    result = run("--json")
    assert result.exit_code == ExitStatus.UNSUPPORTED
    (line,) = [line for line in result.output.splitlines() if line.startswith("{")]
    error = json.loads(line)["error"]
    assert error["code"] == "no-kvm"
    assert "kvm group" in error["remedy"]


def test_unknown_case_is_a_usage_error() -> None:
    result = run("-k", "no such case")
    assert result.exit_code == ExitStatus.USAGE
