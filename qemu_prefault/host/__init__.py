# SPDX-License-Identifier: GPL-2.0-or-later
"""Information from the kernel about KVM, QEMU's process, memory and limits."""
