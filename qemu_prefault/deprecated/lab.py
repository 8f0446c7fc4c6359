# SPDX-License-Identifier: GPL-2.0-or-later
"""Print the command that replaces ``python -m qemu_prefault.lab``, and fail."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print(
        "qemu-prefault: the lab has moved to its own package. Run: python -m qemu_prefault_lab\n"
        "  to install the package, run in a checkout: pip install ./lab",
        file=sys.stderr,
    )
    sys.exit(2)
