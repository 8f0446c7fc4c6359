# SPDX-License-Identifier: GPL-2.0-or-later
"""Define and format sizes."""

from __future__ import annotations

from typing import Final

#: Size of the smallest x86 page, in bytes.
PAGE_SIZE: Final = 4096
#: Size of the x86 page that one entry of a page directory maps, in bytes.
HUGE_PAGE_SIZE: Final = 2 << 20

#: Bytes in one MiB.
MIB: Final = 1 << 20
#: Bytes in one GiB.
GIB: Final = 1 << 30


def format_size(number: int) -> str:
    """Format a number of bytes with a binary unit, for example ``384.0 MiB``."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
