# SPDX-License-Identifier: GPL-2.0-or-later
"""Entry point of ``python -m qemu_prefault`` and the ``qemu-prefault`` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
