# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the summary of an avocado job with results that avocado wrote."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

from qemu_prefault.errors import FailedError

AVOCADO = Path(__file__).resolve().parents[2] / "avocado"
SAMPLE = {"seconds": 1.5, "faults": 1100, "emulated": 100}
DISTRO_ROW = {"distro": "debian13", "moment": "boot", "pages": "never", "machine": "pc",
              "backing": "ram", "firmware": "seabios", "smp": 1, "without": None,
              "with": SAMPLE}  # fmt: skip
VT_ROW = {"moment": "restore", "without": 19740, "with": 0}

# Whiteboards that other tests may write. The job below contains one test for each of them.
STORED = {
    "empty": "",
    "text": "KVM version: 6.12\nQEMU version: 10.0",
    "avocado_vt": str({"kvm_version": "6.12.118", "qemu_version": "10.0.13"}),
    "object": json.dumps(VT_ROW),
}
OTHER = [
    *("42", '"text"', "null", "NaN", "\x00\x1b[31m\x7f", "\udcff", "[" * 100_000),
    *("[1, 2]", '[{"moment": "boot"}, {"distro": 1, "moment": 2, "with": 3}, null]'),
    json.dumps([DISTRO_ROW | {"with": {}}, DISTRO_ROW | {"without": [1]}]),
    json.dumps([VT_ROW])[:-1],
    json.dumps([VT_ROW]) * 2,
]
OWN = {"own_vt": json.dumps([VT_ROW]), "own_distro": json.dumps([DISTRO_ROW])}
# Whiteboards that avocado cannot store, so that their tests end with an error.
UNSTORABLE = {"none": None}
PASSING = 1 + len(STORED) + len(OWN)
JOB = f"""
from avocado import Test

class Whiteboard(Test):
    def test_absent(self):
        pass
    def test_failing(self):
        self.whiteboard = {json.dumps([VT_ROW])!r}
        self.fail("as it should")
    def test_cancelled(self):
        self.cancel("not here")
""" + "".join(
    f"    def test_{name}(self):\n        self.whiteboard = {text!r}\n"
    for name, text in (STORED | OWN | UNSTORABLE).items()
)


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """Load avocado/run.py as a module."""
    spec = importlib.util.spec_from_file_location("avocado_run", AVOCADO / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def job(runner: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run a job with one test for each whiteboard, and return its results.json."""
    directory = tmp_path_factory.mktemp("job")
    (directory / "job.py").write_text(JOB)
    with contextlib.suppress(FailedError):  # some tests of the job fail
        runner.python_on(
            runner.site(runner.REQUIREMENTS), "-m", "avocado", "run", str(directory / "job.py"),
            "--job-results-dir", str(directory), "--disable-sysinfo",
        )  # fmt: skip
    found: dict[str, Any] = json.loads((directory / "latest/results.json").read_text())
    return found


class SumUp(Protocol):
    """A function that summarizes the job's tests with certain statuses."""

    def __call__(self, *statuses: str, whiteboard: str | None = None) -> tuple[int, list[str]]:
        """Summarize the tests with these statuses.

        :param whiteboard: The text that replaces each test's whiteboard.
        :returns: The exit status and the printed lines.
        """


@pytest.fixture
def sum_up(
    runner: ModuleType, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> SumUp:
    def run(*statuses: str, whiteboard: str | None = None) -> tuple[int, list[str]]:
        replaced = {} if whiteboard is None else {"whiteboard": whiteboard}
        tests = [test | replaced for test in job["tests"] if test["status"] in statuses]
        (tmp_path / "results.json").write_text(json.dumps(job | {"tests": tests}))
        return runner.sum_up([tmp_path]), capsys.readouterr().out.splitlines()

    return run


def test_avocado_stores_the_whiteboards(job: dict[str, Any]) -> None:
    stored = {test["name"].rpartition("test_")[2]: test["whiteboard"] for test in job["tests"]}
    assert (STORED | OWN).items() <= stored.items()


@pytest.mark.parametrize("whiteboard", [*STORED.values(), *OTHER])
def test_foreign_whiteboards_have_no_rows(sum_up: SumUp, whiteboard: str) -> None:
    status, lines = sum_up("PASS", "CANCEL", whiteboard=whiteboard)
    assert status == 0
    assert not [line for line in lines if line.startswith("|")]
    assert lines[-1] == f"{PASSING} passed, 0 failed, 1 skipped"


@pytest.mark.parametrize(
    "row, cells",
    [
        (VT_ROW, "| restore | 19,740 | 0 |"),
        (DISTRO_ROW, "| debian13 | pc | boot |  | 1.5 |  | 1,000 |  | 100 |"),
    ],
)
def test_own_rows_are_a_table(sum_up: SumUp, row: dict[str, Any], cells: str) -> None:
    status, lines = sum_up("PASS", whiteboard=json.dumps([row]))
    assert status == 0
    assert len([line for line in lines if line.endswith(cells)]) == PASSING


def test_whole_job_is_summed_up(sum_up: SumUp) -> None:
    """Summarize rows, failed tests, and whiteboards of other projects' tests."""
    status, lines = sum_up("PASS", "FAIL", "ERROR", "CANCEL")
    assert status == 1
    assert any(line.startswith("| debian13 | pc |") for line in lines)
    assert any(line.startswith("FAIL: ") and line.endswith(": as it should") for line in lines)
    assert len([line for line in lines if line.startswith("ERROR: ")]) == len(UNSTORABLE)
    assert lines[-1] == f"{PASSING} passed, {1 + len(UNSTORABLE)} failed, 1 skipped"


def test_job_without_results_failed(
    runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a job counts as failed if avocado writes no results.json.

    avocado does not write this file if it finds no test.
    """
    assert runner.sum_up([tmp_path]) == 1
    assert "ran no test" in capsys.readouterr().out
