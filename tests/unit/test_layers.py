# SPDX-License-Identifier: GPL-2.0-or-later
"""Test rules that import-linter does not check.

These rules apply to imports in TYPE_CHECKING blocks, and to error codes in string literals.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_prefault
from qemu_prefault.errors import Code

PACKAGE = Path(qemu_prefault.__file__).parent
#: The layers from the lowest to the highest, as pyproject.toml lists them for import-linter.
LAYERS = (
    ("text",),
    ("units", "errors", "logs"),
    ("host",),
    ("qemu",),
    ("agents",),
    ("engine",),
    ("api",),
    ("libvirt", "conformance"),
    ("cli",),
    ("deprecated",),
)
FLOORS = {name: floor for floor, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> Iterator[str]:
    """Yield the layer of every import in a file."""
    package = ("qemu_prefault", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = (*base, *(node.module.split(".") if node.module else ()))
            if names == ("qemu_prefault",):
                yield from (alias.name for alias in node.names)
            elif names[:1] == ("qemu_prefault",):
                yield names[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_up(path: Path) -> None:
    own = FLOORS.get(layer_of(path), -1)
    up = {name for name in imported_layers(path) if FLOORS.get(name, -1) > own}
    assert not up or layer_of(path) == "native"


def given_codes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "code":
            value = getattr(node.value, "value", None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_codes_come_from_the_catalogue(path: Path) -> None:
    assert list(given_codes(path)) == []


def test_every_code_of_the_catalogue_is_used() -> None:
    text = "".join(path.read_text() for path in [*MODULES, PACKAGE / "errors.py"])
    assert [code.name for code in Code if f"Code.{code.name}" not in text] == []
