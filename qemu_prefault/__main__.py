# SPDX-License-Identifier: GPL-2.0-or-later
"""The entry point of ``python -m qemu_prefault`` and of ``qemu-prefault``."""

from .cli.main import main

if __name__ == "__main__":
    main()
