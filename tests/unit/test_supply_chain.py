# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that pip installs only packages with known digests, and that apt checks expiry dates."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qemu_prefault_lab
from qemu_prefault_lab import image

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(qemu_prefault_lab.__file__).parent
LOCKS = [
    *(ROOT / part / "requirements.txt" for part in ("tests", "docs", "avocado", "avocado/vt")),
    LAB / "qemu-build-requirements.txt",
]
ENTRY = re.compile(
    r"^([\w.-]+)==([\w.!+-]+)((?: ; [^\\\n]+)?(?: \\\n +--hash=sha256:\w{64})+)$", re.M
)


def entries(lock: Path) -> list[tuple[str, str]]:
    """Return the names and versions of the packages in a requirements.txt."""
    text = re.sub(r"^ *#.*\n", "", lock.read_text(), flags=re.MULTILINE)
    assert ENTRY.sub("", text).split() == [], "an entry has no version or no digest"
    return [(name, version) for name, version, _ in ENTRY.findall(text)]


@pytest.fixture
def forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a forged index the only source of packages, and return a new cache directory."""
    index = tmp_path / "index"
    index.mkdir()
    for name, version in {entry for lock in LOCKS if lock.exists() for entry in entries(lock)}:
        stem = f"{name.replace('-', '_').replace('.', '_')}-{version}"
        info = f"{stem}.dist-info"
        with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Name: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    cache = tmp_path / "cache"
    for variable, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "QEMU_PREFAULT_CACHE": str(cache),
    }.items():
        monkeypatch.setenv(variable, value)
    return cache


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.parent.name))
def test_all_packages_have_digests(lock: Path) -> None:
    assert len(entries(lock)) >= 2


def test_make_refuses_forged_packages(forged: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "with-env", "", "true"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert list(forged.glob("*/complete")) == []


def test_docs_refuse_forged_packages(
    forged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install = runpy.run_path(str(ROOT / "scripts" / "make-docs.py"))["install_sphinx"]
    with pytest.raises(subprocess.CalledProcessError):
        install()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert list(forged.glob("docs-*")) == []


def test_avocado_refuses_forged_packages(forged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import runpy, sys; run = runpy.run_path(sys.argv[1]); run['site'](run[sys.argv[2]])"
    for requirements in ("REQUIREMENTS", "VT_REQUIREMENTS"):
        argv = [sys.executable, "-c", code, str(ROOT / "avocado" / "run.py"), requirements]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "DO NOT MATCH THE HASHES" in done.stderr
    assert list(forged.glob("avocado-*")) == []


def test_released_suites_expire() -> None:
    """Check that apt refuses expired indexes of all suites that Debian has released."""
    variants = {suite for variant in image.VARIANTS.values() for suite in variant.suites}
    unchecked = {s for s in variants if any("Valid-Until" in o for o in image.apt_options(s))}
    assert unchecked == {"sid", "testing"}
