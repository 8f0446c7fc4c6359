# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m qemu_prefault.lab``: print the new command, and fail."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print(
        "qemu-prefault: the lab has moved to its own package: python -m qemu_prefault_lab\n"
        "  to install it from a checkout: pip install ./lab",
        file=sys.stderr,
    )
    sys.exit(2)
