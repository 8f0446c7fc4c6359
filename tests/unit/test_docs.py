# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that Markdown links resolve and that the FAQ quotes real messages."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qemu_prefault.errors import Code

ROOT = Path(__file__).resolve().parents[2]
FAQ = ROOT / "docs" / "operations" / "faq.md"
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts[:-1])
)
MESSAGES = re.findall(r"^## `(.*)`$", FAQ.read_text(), re.MULTILINE)


@cache
def sources() -> str:
    """Return all string literals of the package, with ``…`` for replacement fields."""
    return "\n".join(
        text
        for path in (ROOT / "qemu_prefault").rglob("*.py")
        for text in literals(ast.parse(path.read_text()))
    )


def literals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_in_sources(message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in re.split(" ?… ?", message))
    assert re.search(pattern, sources()), f"faq.md quotes an unknown message: {message}"


def test_codes_exist() -> None:
    quoted = set(re.findall(r"^Code `([a-z-]+)`", FAQ.read_text(), re.MULTILINE))
    assert len(quoted) >= 10
    assert quoted <= set(Code)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST derive them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found.add(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_picture_shows_figures_of_benchmarks() -> None:
    picture = runpy.run_path(str(ROOT / "tests" / "bench" / "picture.py"))
    drawn = picture["draw"](picture["read_pairs"]((ROOT / "docs" / "benchmarks.md").read_text()))
    assert (ROOT / "docs" / "images" / "faults.svg").read_text() == drawn, "run picture.py"
