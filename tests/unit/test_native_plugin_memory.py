# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin does not populate huge pages that the host does not have."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import qemu_prefault

NATIVE = Path(qemu_prefault.__file__).parent / "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    path = tmp_path_factory.mktemp("memory") / "start"
    sources = [*NATIVE.glob("plugin/*.c"), *NATIVE.glob("common/*.c")]
    flags = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}")
    main = Path(__file__).with_name("plugin_memory.c")
    subprocess.run(["cc", *flags, main, *sources, "-o", path], check=True)
    return path


@pytest.mark.parametrize("how", ["learn", "hook"])
def test_short_hugetlb_pool_is_not_populated_from(program: Path, how: str) -> None:
    done = subprocess.run([program, how], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel has no huge pages")
    page_size, short, populate = done.stdout.split()
    if page_size != str(2 << 20) or short != "1":
        pytest.skip(f"huge pages of {page_size} bytes, or 64 GiB of them are free")
    assert populate == "resident"
    assert "populating needs 65536 MiB of huge pages" in done.stderr
    assert "only present pages are prefaulted" in done.stderr
