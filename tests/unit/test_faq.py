# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/operations/faq.md quotes messages and codes that the sources have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qemu_prefault.errors import Code

ROOT = Path(__file__).resolve().parents[2]
FAQ = ROOT / "docs" / "operations" / "faq.md"
MESSAGES = re.findall(r"^## `(.*)`$", FAQ.read_text(), re.MULTILINE)


@cache
def sources() -> str:
    """All string literals of the package, one a line; a replacement field is ``…``."""
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
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, sources()), f"faq.md quotes a message that no source has: {message}"


def test_codes_exist() -> None:
    quoted = set(re.findall(r"^Code `([a-z-]+)`", FAQ.read_text(), re.MULTILINE))
    assert len(quoted) >= 10
    assert quoted <= set(Code)
