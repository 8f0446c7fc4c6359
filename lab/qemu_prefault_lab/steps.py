# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the programs that build the lab."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu_prefault.errors import UnsupportedError

from .errors import ImageError

_TOLD_LINES = 25


def need(program: str, package: str) -> str:
    """Return the path of a program.

    :raises UnsupportedError: If the program is not installed. The error names the Debian package.
    """
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise UnsupportedError(
            f"the lab needs {program}, which is not installed",
            f"apt-get install {package}\n(or your distribution's package that contains {program})",
        )
    return path


def run_step(
    argv: Sequence[str],
    what: str,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program and return its output.

    :raises ImageError: If the program failed. The error includes the end of the program's output.
    """
    result = subprocess.run(
        argv,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        lines = result.stdout.splitlines()[-_TOLD_LINES:]
        raise ImageError(
            f"{what} failed: {argv[0]} exited with {result.returncode}",
            "\n".join(f"    {line}" for line in lines),
        )
    return result.stdout
