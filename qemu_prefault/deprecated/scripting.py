# SPDX-License-Identifier: GPL-2.0-or-later
"""The old name of :mod:`qemu_prefault.cli.scripting` in version 0.1."""

from __future__ import annotations

import warnings

from qemu_prefault.cli.scripting import Main, parser, run, show

__all__ = ["Main", "parser", "run", "show"]

warnings.warn(
    "qemu_prefault.scripting is deprecated and will be removed after 0.2: "
    "use qemu_prefault.cli.scripting",
    DeprecationWarning,
    stacklevel=2,
)
