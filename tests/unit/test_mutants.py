# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that every mutant applies to the source, and that renamed tests are found."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parent.parent
HISTORY = """old\tnew
tests/a.py::one\ttests/b.py::first
tests/a.py::two\ttests/b.py::second\ta remark
tests/a.py::two\ttests/c.py::third
tests/a.py::case[x]\ttests/b.py::case_x
tests/a.py::case[y]\ttests/b.py::other[y]
"""


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TESTS))
    return importlib.import_module("mutate")


def test_every_mutant_applies_exactly_once() -> None:
    command = [sys.executable, str(TESTS / "mutate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tests/a.py::one", ["tests/z.py::first"]),
        ("tests/a.py::one[p-1]", ["tests/z.py::first[p-1]"]),
        ("tests/a.py::two", ["tests/b.py::second", "tests/c.py::third"]),
        ("tests/a.py::case", ["tests/b.py::case_x", "tests/b.py::other"]),
        ("tests/a.py::case[y]", ["tests/b.py::other[y]"]),
        ("tests/a.py::never_renamed", ["tests/a.py::never_renamed"]),
    ],
)
def test_renamed_tests_are_followed(
    mutate: ModuleType, tmp_path: Path, old: str, new: list[str]
) -> None:
    (tmp_path / "01.tsv").write_text(HISTORY)
    (tmp_path / "02.tsv").write_text("tests/b.py::first\ttests/z.py::first\n")
    assert list(mutate.current_ids(old, mutate.read_history(tmp_path))) == new
