# SPDX-License-Identifier: GPL-2.0-or-later
"""0.1's ``qemu_prefault.scripting``, which is :mod:`qemu_prefault.cli.scripting` now."""

from __future__ import annotations

import warnings

from qemu_prefault.cli.scripting import Main, parser, run, show

__all__ = ["Main", "parser", "run", "show"]

warnings.warn(
    "qemu_prefault.scripting is deprecated and ends with 0.2: use qemu_prefault.cli.scripting",
    DeprecationWarning,
    stacklevel=2,
)
