# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that qemu-prefault and its lab are separate distributions."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import qemu_prefault

LAB = Path(__file__).resolve().parents[2] / "lab"
WITHOUT_LAB = """
import sys
from importlib.abc import MetaPathFinder

class NoLab(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "qemu_prefault_lab":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoLab())
from qemu_prefault.__main__ import main

main()
"""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_demo_without_lab_is_unsupported(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LAB, "demo", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    if options:
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "no-lab"
        remedy = error["remedy"]
    else:
        remedy = done.stderr
    assert "pip install ./lab" in remedy
    assert "make demo" in remedy


def test_product_excludes_lab() -> None:
    files = metadata.files("qemu-prefault")
    assert files
    assert not [file for file in files if file.parts[0] == "qemu_prefault_lab"]
    assert not [file for file in files if file.parts[:2] == ("qemu_prefault", "lab")]


def test_lab_requires_this_version_of_the_product() -> None:
    """Check that the lab requires its own version of qemu-prefault.

    The lab uses internals of qemu-prefault, so both are released together.
    """
    project = tomllib.loads((LAB / "pyproject.toml").read_text())["project"]
    assert project["version"] == qemu_prefault.__version__
    assert f"qemu-prefault=={qemu_prefault.__version__}" in project["dependencies"]


def test_lab_failure_has_its_own_exit_status(tmp_path: Path) -> None:
    """Check that the status of a lab failure differs from that of a failed command."""
    done = subprocess.run(
        [sys.executable, "-m", "qemu_prefault_lab", "qemu", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 125
    assert done.stderr.startswith("error: ")
