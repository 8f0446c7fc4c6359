# SPDX-License-Identifier: GPL-2.0-or-later
"""Build test programs from the plugin's C files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import qemu_prefault

#: The directory of the installed package's C files.
NATIVE = Path(qemu_prefault.__file__).parent / "native"
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}")


def link_with_plugin(
    source: Path,
    output: Path,
    *flags: str,
    parts: Sequence[str] = ("plugin/*.c", "common/*.c"),
) -> Path:
    """Link a C file with files of the plugin, and return the program's path.

    Skip the test if no C compiler is installed.

    :param parts: Patterns that select the plugin's files.
    """
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    files = [path for part in parts for path in NATIVE.glob(part)]
    subprocess.run(["cc", *_FLAGS, *flags, source, *files, "-o", output], check=True)
    return output
