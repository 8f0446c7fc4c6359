# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how tests/run.py determines the result of a suite."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from run import ROOT, Result, Suite, judge

PYTEST = Suite("some", tests="tests/some")
COMMAND = Suite("some", command="true")


def write_junit(
    path: Path, tests: int = 0, failures: int = 0, errors: int = 0, skipped: int = 0
) -> Path:
    counts = f"tests='{tests}' failures='{failures}' errors='{errors}' skipped='{skipped}'"
    case = "<testcase classname='a' name='b'><failure message='why&#10;else'/></testcase>"
    path.write_text(f"<testsuites><testsuite {counts}>{case * failures}</testsuite></testsuites>")
    return path


def test_counts_are_read(tmp_path: Path) -> None:
    junit = write_junit(tmp_path / "junit", tests=9, failures=1, errors=2, skipped=3)
    assert judge(PYTEST, 1, junit) == Result(3, 3, 3, failures=["a::b: why"])


def test_command_counts_as_one_test(tmp_path: Path) -> None:
    assert judge(COMMAND, 0, tmp_path / "none") == Result(passed=1)
    assert judge(COMMAND, 2, tmp_path / "none") == Result(failed=1, note="exited with status 2")


def test_no_tests_is_a_failure(tmp_path: Path) -> None:
    none = Result(failed=1, note="ran no test")
    assert judge(PYTEST, 0, tmp_path / "none") == none
    assert judge(PYTEST, 0, write_junit(tmp_path / "empty")) == none


def test_truncated_results_are_a_failure(tmp_path: Path) -> None:
    junit = write_junit(tmp_path / "junit", tests=2)
    junit.write_text(junit.read_text()[:-10])
    assert judge(PYTEST, -9, junit) == Result(failed=1, note="exited with status -9")


def test_only_skips_is_a_failure_unless_allowed(tmp_path: Path) -> None:
    junit = write_junit(tmp_path / "junit", tests=2, skipped=2)
    assert judge(PYTEST, 0, junit).failed == 1
    assert judge(Suite("some", tests="x", may_skip=True), 0, junit) == Result(skipped=2)


def test_bad_exit_status_is_a_failure(tmp_path: Path) -> None:
    junit = write_junit(tmp_path / "junit", tests=2)
    assert judge(PYTEST, 3, junit) == Result(2, 1, 0, note="exited with status 3")


@pytest.mark.parametrize("tier", ["test", "full"])
def test_needed_suites_are_listed_before(tier: str) -> None:
    table = tomllib.loads((ROOT / "tests" / "suites.toml").read_text())["suite"]
    seen: set[str] = set()
    for suite in (suite for entry in table if (suite := Suite(**entry)).run in ("both", tier)):
        assert suite.name not in seen
        assert set(suite.all_needs()) <= seen
        assert [bool(suite.command), bool(suite.tests), bool(suite.nested)].count(True) == 1
        seen.add(suite.name)
