# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs every suite, two at a time, and sums up. Called by ``make``, inside ``scripts/with-env``.

    python tests/run.py [--full] [NAME...]

Every line of output is prefixed with its suite. The last line is ``N passed, N failed, N
skipped``, over all suites; the exit status is 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
REPORTING = ("-ra", "-q", "--color=no")


@dataclass(frozen=True)
class Suite:
    """One command. ``junit``: it is pytest, and writes its results where told.

    ``needs``: names of suites that have to succeed first.
    """

    name: str
    command: tuple[str, ...]
    junit: bool = False
    needs: tuple[str, ...] = ()
    minutes: float = 10


def images(variant: str) -> Suite:
    """Builds what the lab boots from, unless it is cached."""
    command = ("python", "-m", "qemu_prefault_lab", "build", variant)
    return Suite(f"image-{variant}", command, minutes=20)


def host(name: str, *arguments: str, needs: tuple[str, ...] = (), minutes: float = 10) -> Suite:
    """Tests that run on this machine."""
    return Suite(name, ("python", "-m", "pytest", *REPORTING, *arguments), True, needs, minutes)


def lab(
    name: str,
    variant: str,
    *arguments: str,
    npt: bool = True,
    tdp_mmu: bool = True,
    qemu: str = "",
    uefi: bool = False,
    minutes: float = 20,
) -> Suite:
    """Tests that run in the lab, on a freshly restored L1.

    :param qemu: a release of the patched QEMU that is to be there.
    :param uefi: guests with UEFI have to run.
    """
    command = ["python", "-m", "qemu_prefault_lab", "pytest", "--variant", variant]
    command += [] if npt else ["--no-npt"]
    command += [] if tdp_mmu else ["--no-tdp-mmu"]
    command += [f"--qemu={qemu}"] if qemu else []
    command += ["--uefi"] if uefi else []
    for wheel in os.environ.get("QEMU_PREFAULT_WHEELS", "").split():
        command += ["--wheel", wheel]
    command += ["--timeout", str(int(minutes * 60))]
    command += ["--", *REPORTING, "tests/nested", *arguments]
    needs = [f"image-{variant}"]
    needs += [f"qemu-{qemu or '10.0'}"] if qemu or uefi else []
    return Suite(name, tuple(command), True, tuple(needs), minutes + 5)


def qemu(release: str) -> tuple[Suite, Suite]:
    """The patched QEMU is built, and checked by QEMU's own tests."""
    build = f"qemu-{release}"
    checked = ("make", "qemu", f"QEMU_ARGS=--release {release} --check")
    return (
        Suite(build, ("make", "qemu", f"QEMU_ARGS=--release {release}"), minutes=60),
        Suite(f"{build}-check", checked, needs=(build,), minutes=60),
    )


LINT = (
    Suite("ruff", ("ruff", "check", ".")),
    Suite("format", ("ruff", "format", "--check", ".")),
    Suite("mypy", ("python", "-m", "mypy")),
)
HOST = (
    host("unit", "tests/unit"),
    host("qemu", "tests/qemu"),
)
IMAGES = tuple(images(variant) for variant in ("trixie", "bookworm", "sid"))
LAB_ITSELF = host("host", "tests/lab", needs=tuple(suite.name for suite in IMAGES))
THIRTY_BOOTS = Suite(
    "boots",
    ("python", "-m", "qemu_prefault_lab", "boots", "30"),
    needs=("image-trixie",),
    minutes=60,
)
# All but what is about the plugin by itself, or about what no agent does.
ANY_AGENT = " or ".join(
    f"test_{name}.py"
    for name in (
        *("prefault", "layouts", "incoming", "nested", "scripts", "follow", "interference"),
        *("kill", "migration_campaign"),
    )
)
AREAS = "(test_area and (mapping or slots))"
# The conformance suite where the suites above do not run it: see docs/conformance.md.
CONFORMANCE = (
    *(
        lab(f"legacy-{name}", name, "-k", "test_conformance", tdp_mmu=False)
        for name in ("trixie", "sid")
    ),
    lab("bookworm-conf", "bookworm", "-k", "test_conformance"),
    lab("bookworm-legacy", "bookworm", "-k", "test_conformance", tdp_mmu=False),
    *(
        lab(f"shadow-{name}", name, "-k", "test_conformance", npt=False)
        for name in ("trixie", "sid", "bookworm")
    ),
)
AVOCADO = ("python", "avocado/run.py")
AVOCADO_LISTED = Suite("avocado-listed", (*AVOCADO, "check"))
AVOCADO_SMOKE = (
    Suite(
        "avocado",
        (*AVOCADO, "distro", "--distro", "debian13", "--test", "boot", "--test", "restore"),
        minutes=60,
    ),
    Suite("avocado-vt", (*AVOCADO, "vt", "qemu-prefault.prefault.boot"), minutes=60),
)
# In this order, two at a time: the longest first.
TEST = (
    IMAGES[0],
    lab(
        *("trixie", "trixie", "-m", "not full"),
        *("-k", "not (test_kill.py or test_guest.py or unsupported)"),
        *("--boots", "2"),
    ),
    *LINT,
    *HOST,
    AVOCADO_LISTED,
    lab("kill", "trixie", "-k", "test_kill"),
    *IMAGES[1:],
    LAB_ITSELF,
    lab(
        "sid",
        "sid",
        "-m",
        "not full",
        "-k",
        f"to_no_faults or guest_takes_no_faults or the_quirk or {AREAS}",
    ),
    lab("bookworm", "bookworm", "-k", "unsupported"),
    lab("shadow", "trixie", "-k", "unsupported or (test_area and paging) or trace", npt=False),
)
FULL = (
    IMAGES[0],
    lab("kill", "trixie", "-k", "test_kill", "--kills", "1000", minutes=120),
    lab("campaigns", "trixie", "-k", "campaign", "--boots", "100", minutes=120),
    lab("trixie", "trixie", "-k", "not (campaign or test_kill)", minutes=60),
    *LINT,
    *HOST,
    AVOCADO_LISTED,
    *AVOCADO_SMOKE,
    *IMAGES[1:],
    lab("sid-campaigns", "sid", "-k", "campaign", "--boots", "100", minutes=120),
    lab("sid", "sid", "-k", "not campaign", minutes=60),
    images("libvirt"),
    lab("libvirt", "libvirt", "-k", "libvirt", minutes=90),
    LAB_ITSELF,
    lab("bookworm", "bookworm", "-k", "unsupported or test_guest.py"),
    lab("shadow", "trixie", "-k", "unsupported", npt=False),
    *qemu("10.0"),
    *qemu("10.2"),
    lab("uefi", "trixie", "-k", "test_plugin_firmware", uefi=True),
    lab("patched", "trixie", "-k", "test_patched_qemu", qemu="10.0"),
    lab("patched-10.2", "trixie", "-k", "test_patched_qemu", qemu="10.2"),
    lab(
        *("agents", "trixie", "-k", ANY_AGENT),
        *("--agents", "attach,plugin,qmp", "--kills", "30"),
        qemu="10.0",
        minutes=90,
    ),
    *CONFORMANCE,
    THIRTY_BOOTS,
)


@dataclass
class Result:
    """What a suite came to. A suite that is no pytest counts as one test."""

    suite: Suite
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def judge(self, status: int, junit: Path) -> None:
        if self.suite.junit and junit.exists():
            for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
                tests, failures, errors, skipped = (
                    int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
                )
                self.failed += failures + errors
                self.skipped += skipped
                self.passed += tests - failures - errors - skipped
                self.failures += failed_cases(suite)
            if status and not self.failed:
                self.failed, self.note = 1, f"ended with status {status}"
        elif status:
            self.failed, self.note = 1, self.note or f"ended with status {status}"
        elif self.suite.junit:
            self.failed, self.note = 1, "left no results"
        else:
            self.passed = 1


def failed_cases(suite: ElementTree.Element) -> list[str]:
    """Name and first line of the reason of each test that failed."""
    found = []
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            reason = problem.get("message", "").partition("\n")[0]
            found.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    return found


_printing = threading.Lock()


def say(name: str, line: str) -> None:
    with _printing:
        print(f"{name:>14} | {line}", flush=True)


def run(result: Result, results: dict[str, Result], directory: Path) -> None:
    """Run one suite, after those it needs."""
    suite = result.suite
    missing = []
    for name in suite.needs:
        if name in results:
            results[name].ended.wait()
            missing += [name] if results[name].failed else []
    started = time.monotonic()
    junit = directory / f"{suite.name}.xml"
    if missing:
        result.note = f"not run, because {', '.join(missing)} failed"
        result.judge(1, junit)
    else:
        say(suite.name, "starts")
        result.judge(execute(suite, junit, result), junit)
    result.seconds = time.monotonic() - started
    counts = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
    say(suite.name, f"ends after {result.seconds:.1f} s: {counts} {result.note}".rstrip())
    result.ended.set()


def execute(suite: Suite, junit: Path, result: Result) -> int:
    command = list(suite.command)
    if suite.junit:
        at = command.index("--") if "--" in command else len(command)
        command[at:at] = ["--junit" if "--" in command else "--junit-xml", str(junit)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def give_up() -> None:
        result.note = f"given up after {suite.minutes:g} minutes"
        process.kill()

    timer = threading.Timer(suite.minutes * 60, give_up)
    timer.start()
    try:
        assert process.stdout
        for line in process.stdout:
            say(suite.name, line.rstrip())
        return process.wait()
    finally:
        timer.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the test suites.")
    parser.add_argument("--full", action="store_true", help="everything on every kernel")
    parser.add_argument("--jobs", type=int, default=2, help="suites at a time (default 2)")
    parser.add_argument("names", nargs="*", help="only these suites, or: lint")
    options = parser.parse_args()
    suites = FULL if options.full else TEST
    if names := set(options.names):
        if "lint" in names:
            names |= {suite.name for suite in LINT}
        names |= {need for suite in suites if suite.name in names for need in suite.needs}
        suites = tuple(suite for suite in suites if suite.name in names)
        if unknown := names - {suite.name for suite in suites} - {"lint"}:
            parser.error(f"no such suite: {', '.join(sorted(unknown))}")

    started = time.monotonic()
    results = {suite.name: Result(suite) for suite in suites}
    with (
        tempfile.TemporaryDirectory(prefix="qemu-prefault-tests-") as scratch,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as executor,
    ):
        jobs = [executor.submit(run, r, results, Path(scratch)) for r in results.values()]
        for job in jobs:
            job.result()

    print(f"\n{'suite':14} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>9}")
    for result in results.values():
        print(
            f"{result.suite.name:14} {result.passed:7} {result.failed:7} {result.skipped:8} "
            f"{result.seconds:9.1f}  {result.note}".rstrip()
        )
    for result in results.values():
        for failure in result.failures:
            print(f"FAILED {result.suite.name}: {failure}")
    passed, failed, skipped = (
        sum(getattr(result, key) for result in results.values())
        for key in ("passed", "failed", "skipped")
    )
    print(f"{time.monotonic() - started:.0f} s in all\n")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
