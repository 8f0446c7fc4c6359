# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules that query the kernel about KVM, QEMU's process, memory and limits."""
