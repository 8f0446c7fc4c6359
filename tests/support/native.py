# SPDX-License-Identifier: GPL-2.0-or-later
"""Build test programs from the plugin's C files."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import qemu_prefault

#: The directory of the installed package's C files.
NATIVE = Path(qemu_prefault.__file__).parent / "native"
CAPABLE = Path(__file__).with_name("capable_kvm.h")
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}")
#: The sanitizers end the process if they detect an error.
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def link_with_plugin(
    source: Path | None,
    output: Path,
    *flags: str,
    parts: Sequence[str] = ("plugin/*.c", "common/*.c"),
) -> Path:
    """Link a C file with files of the plugin, and return the program's path.

    tests/sanitize.py sets QEMU_PREFAULT_SANITIZE, to build the program with the sanitizers. Skip
    the test if no C compiler is installed.

    :param parts: Patterns that select the plugin's files.
    """
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    if os.environ.get("QEMU_PREFAULT_SANITIZE"):
        flags = (*SANITIZE, *flags)
    files = [path for part in parts for path in NATIVE.glob(part)]
    files += [source] if source else []
    subprocess.run(["cc", *_FLAGS, *flags, *files, "-o", output], check=True)
    return output


def build_capable_plugin(output: Path) -> Path:
    """Build a plugin for which KVM seems to offer the ioctl, and return its path."""
    flags = ("-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-include", CAPABLE)
    return link_with_plugin(None, output, *map(str, flags))
