# SPDX-License-Identifier: GPL-2.0-or-later
"""The :mod:`qemu_prefault.cli.scripting` module under its name in version 0.1."""

from __future__ import annotations

import warnings

from qemu_prefault.cli.scripting import Main, parser, run, show

__all__ = ["Main", "parser", "run", "show"]

warnings.warn(
    "qemu_prefault.scripting is deprecated and will be removed after version 0.2. "
    "Use qemu_prefault.cli.scripting",
    DeprecationWarning,
    stacklevel=2,
)
