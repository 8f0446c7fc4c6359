# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the suites in tests/suites.toml in parallel, and summarize their results.

    python tests/run.py [--full] [NAME...]

``make`` runs this program with ``scripts/with-env``. The program prefixes every line of output with
the suite's name. The last line is ``N passed, N failed, N skipped`` for all suites. The exit status
is 0 only if no suite failed. A pytest suite that ran no test counts as failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from junitparser import Error, Failure, JUnitXml

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-ra", "-q", "--color=no")


@dataclass(frozen=True)
class Suite:
    """An entry in tests/suites.toml, which documents the fields."""

    name: str
    run: str = "both"
    command: str = ""
    lint: bool = False
    tests: str = ""
    nested: str = ""
    marks: str = ""
    lab: str = ""
    options: str = ""
    needs: tuple[str, ...] = ()
    minutes: float = 0
    may_skip: bool = False

    def all_needs(self) -> list[str]:
        return [*self.needs, *([f"image-{self.nested}"] if self.nested else [])]

    def limit(self) -> float:
        """Return the suite's time limit in seconds, which exceeds the lab's own limit."""
        return 60 * (self.minutes or (20 if self.nested else 10)) + (300 if self.nested else 0)

    def argv(self, junit: Path) -> list[str]:
        """Return the suite's command. pytest writes its results to ``junit``."""
        if self.command:
            return shlex.split(self.command)
        if self.tests:
            more = [*(["-m", self.marks] if self.marks else []), *shlex.split(self.options)]
            return ["python", "-m", "pytest", *PYTEST, f"--junit-xml={junit}", self.tests, *more]
        wheels = os.environ.get("QEMU_PREFAULT_WHEELS", "").split()
        return [
            *("python", "-m", "qemu_prefault_lab", "pytest", "--variant", self.nested),
            *shlex.split(self.lab),
            *(word for wheel in wheels for word in ("--wheel", wheel)),
            *("--timeout", f"{self.limit() - 300:g}", "--junit", str(junit)),
            *("--", *PYTEST, "tests/nested", "-m", self.marks, *shlex.split(self.options)),
        ]


@dataclass
class Result:
    """The result of a suite, which counts as one test unless it runs pytest."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def read(self, junit: Path) -> None:
        """Add the results from the file that pytest wrote."""
        for suite in JUnitXml.fromfile(str(junit)):
            bad = suite.failures + suite.errors
            self.failed += bad
            self.skipped += suite.skipped
            self.passed += suite.tests - bad - suite.skipped
            for case in suite:
                for problem in case.result:
                    if isinstance(problem, (Failure, Error)):
                        reason = (problem.message or "").partition("\n")[0]
                        self.failures.append(f"{case.classname}::{case.name}: {reason}")


_printing = threading.Lock()


def say(name: str, line: str) -> None:
    with _printing:
        print(f"{name:>14} | {line}", flush=True)


def execute(suite: Suite, junit: Path) -> Result:
    started = time.monotonic()
    process = subprocess.Popen(
        suite.argv(junit), cwd=ROOT, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(suite.limit(), process.kill)
    timer.start()
    try:
        assert process.stdout
        for line in process.stdout:
            say(suite.name, line.rstrip())
        status = process.wait()
    finally:
        timer.cancel()
    result = judge(suite, status, junit)
    if time.monotonic() - started >= suite.limit():
        result.note = f"killed after {suite.limit() / 60:g} minutes"
    return result


def judge(suite: Suite, status: int, junit: Path) -> Result:
    """Return the result of a suite that exited with this status."""
    result = Result()
    if suite.command:
        result.passed = 0 if status else 1
    elif junit.exists():
        with contextlib.suppress(SyntaxError):  # pytest was killed while it wrote the file
            result.read(junit)
    if status and not result.failed:
        result.failed, result.note = 1, f"exited with status {status}"
    elif not (result.passed or result.failed or (suite.may_skip and result.skipped)):
        result.failed, result.note = 1, "ran no test"
    return result


def run(suite: Suite, jobs: dict[str, Future[Result]], directory: Path) -> Result:
    """Wait for the suites that this suite needs, and then run this suite."""
    broken = [name for name in suite.all_needs() if name in jobs and jobs[name].result().failed]
    started = time.monotonic()
    if broken:
        result = Result(failed=1, note=f"not run, because {', '.join(broken)} failed")
    else:
        say(suite.name, "starts")
        result = execute(suite, directory / f"{suite.name}.xml")
    result.seconds = time.monotonic() - started
    say(suite.name, f"finished after {result.seconds:.1f} s: {result} {result.note}".rstrip())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the test suites.")
    parser.add_argument("--full", action="store_true", help="run all suites, on every kernel")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel suites (default 2)")
    parser.add_argument("names", nargs="*", help="names of suites, or 'lint' for all linters")
    options = parser.parse_args()
    table = tomllib.loads((ROOT / "tests" / "suites.toml").read_text())["suite"]
    tier = "full" if options.full else "test"
    suites = [suite for entry in table if (suite := Suite(**entry)).run in ("both", tier)]
    names = set(options.names)
    if "lint" in names:
        names = names - {"lint"} | {suite.name for suite in suites if suite.lint}
    if unknown := names - {suite.name for suite in suites}:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    while missing := {n for s in suites if s.name in names for n in s.all_needs()} - names:
        names |= missing
    suites = [suite for suite in suites if not names or suite.name in names]

    started = time.monotonic()
    jobs: dict[str, Future[Result]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="qemu-prefault-tests-") as scratch,
        ThreadPoolExecutor(options.jobs) as executor,
    ):
        for suite in suites:
            jobs[suite.name] = executor.submit(run, suite, jobs, Path(scratch))
    results = {name: job.result() for name, job in jobs.items()}

    total = Result()
    print(f"\n{'suite':14} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>9}")
    for name, r in results.items():
        line = f"{name:14} {r.passed:7} {r.failed:7} {r.skipped:8} {r.seconds:9.1f}  {r.note}"
        print(line.rstrip())
        total.passed += r.passed
        total.failed += r.failed
        total.skipped += r.skipped
        total.failures += [f"FAILED {name}: {failure}" for failure in r.failures]
    print(*total.failures, sep="\n", end="\n" if total.failures else "")
    print(f"{time.monotonic() - started:.0f} s in total\n\n{total}")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
