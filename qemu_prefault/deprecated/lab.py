# SPDX-License-Identifier: GPL-2.0-or-later
"""Print the command that replaces ``python -m qemu_prefault.lab``, and fail."""

from __future__ import annotations

import sys

from qemu_prefault.text import write

if __name__ == "__main__":
    for line in (
        "qemu-prefault: the lab has moved to its own package. Run: python -m qemu_prefault_lab",
        "  to install the package, run in a checkout: pip install ./lab",
    ):
        write(line, sys.stderr)
    sys.exit(2)
