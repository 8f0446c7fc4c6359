# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU says about itself: the QMP connection, the queries, the memory map."""
