# SPDX-License-Identifier: GPL-2.0-or-later
"""Fill the stage-2 page tables of a running QEMU's guest before the guest needs them."""

__version__ = "0.1.0"
