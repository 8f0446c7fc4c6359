# SPDX-License-Identifier: GPL-2.0-or-later
"""Communicate with QEMU: the QMP connection, the queries, and the guest's memory map."""
