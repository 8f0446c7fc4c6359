# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules that connect to QEMU, query its state, and build the memory map."""
