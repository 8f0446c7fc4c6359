# SPDX-License-Identifier: GPL-2.0-or-later
"""The summary of an avocado job, on results that avocado itself wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

AVOCADO = Path(__file__).resolve().parents[2] / "avocado"
SAMPLE = {"seconds": 1.5, "faults": 1100, "emulated": 100}
DISTRO_ROW = {"distro": "debian13", "moment": "boot", "pages": "never", "machine": "pc",
              "backing": "ram", "firmware": "seabios", "smp": 1, "without": None,
              "with": SAMPLE}  # fmt: skip
VT_ROW = {"moment": "restore", "without": 19740, "with": 0}

# What tests that are not ours leave in a whiteboard; each is one test of the job below.
OTHER = {
    "empty": "",
    "text": "KVM version: 6.12\nQEMU version: 10.0",
    "avocado_vt": str({"kvm_version": "6.12.118", "qemu_version": "10.0.13"}),
    "surrogate": "\udcff",
    "control": "\x00\x1b[31m\x7f",
    "number": "42",
    "string": '"text"',
    "null": "null",
    "constant": "NaN",
    "object": json.dumps(VT_ROW),
    "numbers": "[1, 2]",
    "rows": '[{"moment": "boot"}, {"distro": 1, "moment": 2, "with": 3}, null]',
    "samples": json.dumps([DISTRO_ROW | {"with": {}}, DISTRO_ROW | {"without": [1]}]),
    "cut_off": json.dumps([VT_ROW])[:-1],
    "twice": json.dumps([VT_ROW]) * 2,
    "deep": "[" * 100_000,
}
JOB = f"""
from avocado import Test

class Whiteboard(Test):
    def test_absent(self):
        pass
    def test_binary(self):
        self.whiteboard = b"\\xff\\x00"
    def test_failing(self):
        self.whiteboard = {json.dumps([VT_ROW])!r}
        self.fail("\\udcff is no text")
    def test_cancelled(self):
        self.cancel("not here")

for name, text in {OTHER!r}.items():
    def run(self, text=text):
        self.whiteboard = text
"""


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """avocado/run.py as a module."""
    spec = importlib.util.spec_from_file_location("avocado_run", AVOCADO / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
