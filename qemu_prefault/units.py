# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes, and text that is safe to show: what every layer needs and nothing else."""

from __future__ import annotations

from typing import Final

#: Bytes of x86's smallest page, and of the next one that KVM can map with one leaf.
PAGE_SIZE: Final = 4096
HUGE_PAGE_SIZE: Final = 2 << 20

MIB: Final = 1 << 20
GIB: Final = 1 << 30


def format_size(number: int) -> str:
    """``402653184`` -> ``384.0 MiB``."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """What a peer said must not steer the terminal it is shown on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
