# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m qemu_prefault.lab``: where it went."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print(
        "qemu-prefault: the lab is a distribution of its own now: python -m qemu_prefault_lab\n"
        "  from a checkout: pip install ./lab",
        file=sys.stderr,
    )
    sys.exit(2)
