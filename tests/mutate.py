# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that the tests detect mutants.

    python tests/mutate.py [--list | --check] [--tier TIER]... [--jobs N] [ID...]

A mutant is a small mistake in qemu-prefault. Each entry in tests/mutants.toml describes a mutant
and lists its tests. This program applies the mutant to a copy of the checkout, builds and installs
the copy with ``scripts/with-env``, and runs the mutant's tests on the copy. The mutant is killed if
one of its tests fails. The same tests must pass on an unchanged copy. Otherwise a failure would
not show that the tests detect the mutant.

An entry lists the node ids that its tests had when the mutant was chosen. The tests/history/*.tsv
files, in the order of their names, map old node ids (first column) to new node ids (second column).

The exit status is 0 if every selected mutant is killed. It is 1 if a mutant survives, does not
apply exactly once, or could not be tested. It is 2 if the command line is invalid.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import enum
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "tests" / "mutants.toml"
HISTORY = ROOT / "tests" / "history"
#: The directory with the files that the mutants change.
PRODUCT = "qemu_prefault"
SUFFIXES = frozenset({".py", ".c", ".h"})
GENERATED = frozenset({"helper_blob.h"})
#: A statement that fails if qemu-prefault was not built and installed.
IMPORT = "import qemu_prefault._native"
#: The time limit of the build and of all tests of one mutant, in seconds.
TIMEOUT = 1200
#: The variant of the nested lab that the "nested" tier boots.
VARIANT = "trixie"


class Tier(enum.StrEnum):
    """The environment of a mutant's tests: without QEMU, with QEMU, or in the lab."""

    UNIT = "unit"
    QEMU = "qemu"
    NESTED = "nested"


class Verdict(enum.StrEnum):
    """The outcome of a mutant's tests."""

    KILLED = "killed"
    SURVIVED = "SURVIVED"
    BROKEN = "BROKEN"


class MutantError(Exception):
    """An error whose message states why a mutant cannot be tested."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One entry in mutants.toml.

    :ivar subject: The part of qemu-prefault that the mutant changes.
    :ivar function: The changed function, as information for readers of the file.
    :ivar harm: The effect of the mistake on a user.
    :ivar behaviour: The behaviour that the tests check, without names that may change.
    :ivar find: A multi-line regular expression that matches exactly once in the package.
    :ivar replace: The replacement for the match. ``\\1`` stands for the first group.
    :ivar tests: The node ids that the tests had when the mutant was chosen.
    :ivar before: The verdict when the mutant was chosen.
    """

    id: str
    subject: str
    function: str
    harm: str
    behaviour: str
    tier: Tier
    find: str
    replace: str
    tests: tuple[str, ...]
    before: str


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on a mutant, with the failed tests or the reason for an error."""

    mutant: Mutant
    verdict: Verdict
    detail: str
    seconds: float


# --- the list ---


def read_mutants(path: Path = MUTANTS) -> tuple[Mutant, ...]:
    """Return the mutants in the order of the file.

    :raises MutantError: If a key is missing or unknown, or if an id occurs twice.
    """
    wanted = {field.name for field in fields(Mutant)}
    mutants: list[Mutant] = []
    for entry in tomllib.loads(path.read_text())["mutant"]:
        if entry.keys() != wanted:
            raise MutantError(
                f"{entry.get('id')}: missing or unknown keys {sorted(entry.keys() ^ wanted)}"
            )
        known = {**entry, "tier": Tier(entry["tier"]), "tests": tuple(entry["tests"])}
        mutants.append(Mutant(**known))
    ids = [mutant.id for mutant in mutants]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise MutantError(f"these ids occur twice: {', '.join(sorted(twice))}")
    return tuple(mutants)


def read_history(directory: Path = HISTORY) -> tuple[Mapping[str, tuple[str, ...]], ...]:
    """Return one table per file, which maps old node ids to new ones."""
    tables = []
    for path in sorted(directory.glob("*.tsv")):
        table: dict[str, tuple[str, ...]] = {}
        for line in path.read_text().splitlines():
            old, _, rest = line.partition("\t")
            new = rest.partition("\t")[0].strip()
            if "::" in old and "::" in new:
                table[old] = (*table.get(old, ()), new)
        tables.append(table)
    return tuple(tables)


def current_ids(node: str, history: Iterable[Mapping[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the current node ids for an old node id, without duplicates.

    A table may list a parametrized test as a whole (``file::test``) or case by case
    (``file::test[case]``).
    """
    nodes = [node]
    for table in history:
        nodes = [new for old in nodes for new in _renamed(old, table)]
    return tuple(dict.fromkeys(nodes))


def _renamed(node: str, table: Mapping[str, tuple[str, ...]]) -> Sequence[str]:
    if node in table:
        return table[node]
    base, bracket, case = node.partition("[")
    if bracket and base in table:
        return [new + bracket + case for new in table[base]]
    cases = [new for old, found in table.items() if old.startswith(node + "[") for new in found]
    return [new.partition("[")[0] for new in cases] or [node]


# --- applying ---


def product_texts(root: Path) -> Mapping[Path, str]:
    """Return the text of each file that a mutant may change."""
    paths = (path for path in sorted((root / PRODUCT).rglob("*")) if path.suffix in SUFFIXES)
    return {path: path.read_text() for path in paths if path.name not in GENERATED}


def mutated(mutant: Mutant, texts: Mapping[Path, str]) -> tuple[Path, str]:
    """Return the file that the mutant changes, and its new text.

    :raises MutantError: If the pattern does not match exactly once, or if the mutant changes
        nothing.
    """
    pattern = re.compile(mutant.find, re.MULTILINE)
    places = [path for path, text in texts.items() for _ in pattern.finditer(text)]
    if len(places) != 1:
        names = ", ".join(path.name for path in places) or "no file"
        raise MutantError(f"the pattern matches {len(places)} times: {names}")
    (path,) = places
    changed = pattern.sub(mutant.replace, texts[path])
    if changed == texts[path]:
        raise MutantError(f"the replacement changes nothing in {path.name}")
    return path, changed


@contextmanager
def copy_of_checkout() -> Iterator[Path]:
    """Yield a copy of all tracked files and of new files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="qemu-prefault-mutant-") as name:
        for relative in filter(None, os.fsdecode(listed.stdout).split("\0")):
            source, target = ROOT / relative, Path(name) / relative
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(name)


# --- running tests ---


def pytest_command(tier: Tier, nodes: Sequence[str], junit: Path) -> list[str]:
    """Return the command that runs tests with scripts/with-env.

    The command writes the results to ``junit``. The command fails if qemu-prefault is not
    installed.
    """
    words = ["-q", "--color=no", "-p", "no:cacheprovider", *nodes]
    if tier is Tier.NESTED:
        script = (
            "for wheel in $QEMU_PREFAULT_WHEELS; do wheels+=(--wheel $wheel); done; "
            f"exec python -m qemu_prefault_lab pytest --variant {VARIANT} "
            f'--junit "$0" --timeout {TIMEOUT} "${{wheels[@]}}" -- "$@"'
        )
    else:
        script = 'exec python -m pytest --junit-xml "$0" "$@"'
    return ["bash", "-c", f"python -c '{IMPORT}' || exit; {script}", str(junit), *words]


def run_tests(root: Path, tier: Tier, nodes: Sequence[str]) -> tuple[list[str], int]:
    """Run a checkout's tests, and return the failed tests and the passed count.

    :raises MutantError: If the test run did not complete.
    """
    junit = root / "mutate.xml"
    command = ["scripts/with-env", "", *pytest_command(tier, nodes, junit)]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MutantError(f"the tests did not finish within {TIMEOUT} s") from None
    tail = "\n".join(done.stdout.splitlines()[-15:])
    # pytest exits with 0 if all tests passed, with 1 if some failed, and with another status if it
    # could not run the tests.
    if done.returncode not in (0, 1) or not junit.exists():
        raise MutantError(f"the tests did not run (exit status {done.returncode}):\n{tail}")
    failed, passed = [], 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(str(case.get("name")))
        elif case.find("skipped") is None:
            passed += 1
    if bool(failed) != bool(done.returncode):
        raise MutantError(f"exit status {done.returncode}, but {len(failed)} tests failed:\n{tail}")
    return failed, passed


def check_unmutated(mutants: Sequence[Mutant], nodes: Mapping[str, Sequence[str]]) -> None:
    """Run the mutants' tests on an unchanged copy.

    :raises MutantError: If a test fails, or if all tests of a mutant are skipped.
    """
    for tier in Tier:
        wanted = sorted({n for m in mutants if m.tier is tier for n in nodes[m.id]})
        if not wanted:
            continue
        with copy_of_checkout() as root:
            failed, passed = run_tests(root, tier, wanted)
        if failed:
            raise MutantError(f"these tests fail even without a mutant: {', '.join(failed)}")
        print(f"{passed} tests in the {tier} tier pass without a mutant", flush=True)


def try_mutant(mutant: Mutant, nodes: Sequence[str]) -> Result:
    """Apply a mutant to a copy and run its tests there."""
    started = time.monotonic()
    try:
        with copy_of_checkout() as root:
            path, text = mutated(mutant, product_texts(root))
            path.write_text(text)
            failed, passed = run_tests(root, mutant.tier, nodes)
        if failed:
            verdict, detail = Verdict.KILLED, f"by {', '.join(failed)}"
        elif passed:
            verdict, detail = Verdict.SURVIVED, f"{passed} tests passed"
        else:
            verdict, detail = Verdict.BROKEN, "every test was skipped"
    except MutantError as error:
        verdict, detail = Verdict.BROKEN, str(error)
    return Result(mutant, verdict, detail, time.monotonic() - started)


def check_applicable(mutants: Sequence[Mutant]) -> list[str]:
    """Print the file that each mutant changes, and return errors.

    No tests are run.
    """
    texts = product_texts(ROOT)
    problems = []
    for mutant in mutants:
        try:
            path, _ = mutated(mutant, texts)
        except MutantError as error:
            problems.append(f"{mutant.id}: {error}")
        else:
            print(f"{mutant.id:28} {mutant.tier:7} {path.relative_to(ROOT)}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that the tests kill the mutants.")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests")
    parser.add_argument("--check", action="store_true", help="only check that each mutant applies")
    parser.add_argument("--tier", action="append", type=Tier, choices=list(Tier), default=[])
    parser.add_argument("--jobs", type=int, default=1, help="parallel mutants (unit tier only)")
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these mutants")
    options = parser.parse_args()
    mutants = read_mutants()
    if unknown := set(options.ids) - {mutant.id for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = tuple(
        mutant
        for mutant in mutants
        if mutant.id in (options.ids or [mutant.id])
        and mutant.tier in (options.tier or [mutant.tier])
    )
    history = read_history()
    nodes = {
        mutant.id: tuple(new for old in mutant.tests for new in current_ids(old, history))
        for mutant in mutants
    }
    if options.list:
        for mutant in mutants:
            print(f"{mutant.id} ({mutant.subject}, {mutant.tier}): {mutant.harm}")
            print(*(f"    {node}" for node in nodes[mutant.id]), sep="\n")
        return 0
    if problems := check_applicable(mutants):
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    if options.check:
        return 0
    try:
        check_unmutated(mutants, nodes)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 1
    results = list(_try_all(mutants, nodes, options.jobs))
    killed = sum(result.verdict is Verdict.KILLED for result in results)
    print(f"{killed} of {len(results)} mutants are killed")
    return 0 if killed == len(results) else 1


def _try_all(
    mutants: Sequence[Mutant], nodes: Mapping[str, Sequence[str]], jobs: int
) -> Iterator[Result]:
    """Test the unit tier's mutants in parallel, and then the others one by one."""
    several = [mutant for mutant in mutants if mutant.tier is Tier.UNIT]
    with concurrent.futures.ThreadPoolExecutor(jobs) as executor:
        for result in executor.map(lambda mutant: try_mutant(mutant, nodes[mutant.id]), several):
            yield _printed(result)
    for mutant in mutants:
        if mutant not in several:
            yield _printed(try_mutant(mutant, nodes[mutant.id]))


def _printed(result: Result) -> Result:
    print(
        f"{result.verdict:8} {result.mutant.id:28} {result.seconds:6.1f} s  {result.detail}",
        flush=True,
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
