# SPDX-License-Identifier: GPL-2.0-or-later
"""Options for the fuzz tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.fuzz import Corpus, Target, find_faults

CORPUS = Path(__file__).with_name("corpus")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--inputs", type=int, help="number of inputs for each parser (default 2000)")
    group.addoption("--seed", type=int, default=1, help="seed of the mutations")
    group.addoption("--keep", action="store_true", help="add each fault's input to corpus/")


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Callable[[Target], None]:
    """Return a function that feeds inputs to a parser and fails on any fault."""
    inputs: int | None = request.config.getoption("--inputs")
    seed: int = request.config.getoption("--seed")

    def run(target: Target) -> None:
        count = 2000 // target.cost if inputs is None else inputs
        corpus = Corpus(CORPUS / target.name)
        faults = find_faults(target, corpus.read(), count, seed)
        if request.config.getoption("--keep"):
            for fault in faults:
                corpus.add(fault)
        if faults:
            pytest.fail("\n".join(map(str, faults)), pytrace=False)

    return run
