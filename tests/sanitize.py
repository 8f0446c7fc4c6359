# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the unit tests of the C code with the address and undefined behaviour sanitizers.

    python tests/sanitize.py [PYTEST-ARGUMENT...]

The extension module and the test programs that contain the plugin's files are built with the
sanitizers. The first error ends the process in which it occurs, so the test fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # make sets PYTHONSAFEPATH, which excludes this directory

from support.native import SANITIZE  # noqa: E402

TESTS = (
    *("headroom_agreement", "memory_source", "native_host_ranges", "native_pagemap"),
    *("native_plugin_memory", "native_plugin_socket", "native_plugin_source", "native_xstate"),
    *("process", "seccomp"),
)


def library(name: str) -> str:
    """Return the path of a sanitizer's library."""
    return subprocess.check_output(["cc", f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="qemu-prefault-sanitize-") as scratch:
        source, site = Path(scratch) / "source", Path(scratch) / "site"
        # setuptools writes to the source.
        for name in ("pyproject.toml", "setup.py", "README.md"):
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
        shutil.copytree(ROOT / "qemu_prefault", source / "qemu_prefault")
        pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation"]
        subprocess.run(
            [*pip, "--target", str(site), str(source)],
            env={**os.environ, "CFLAGS": " ".join(SANITIZE)},
            check=True,
        )
        (extension,) = site.glob("qemu_prefault/_native*.so")
        assert b"__asan_" in extension.read_bytes(), "the compiler ignored CFLAGS"
        environment = {
            **os.environ,
            "PYTHONPATH": str(site),
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            # Python does not free all memory before it exits.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "QEMU_PREFAULT_SANITIZE": "1",
        }
        tests = [f"tests/unit/test_{name}.py" for name in TESTS]
        # The address sanitizer delays the reuse of freed memory.
        skip = ["--deselect", "tests/unit/test_native_pagemap.py::test_memory_use_is_constant"]
        argv = [sys.executable, "-m", "pytest", "-q", *tests, *skip, *sys.argv[1:]]
        return subprocess.run(argv, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
