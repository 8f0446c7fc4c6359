# SPDX-License-Identifier: GPL-2.0-or-later
"""The QMP connection to QEMU, the queries, and the guest's memory map."""
