# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts that the kernel reports about KVM and about QEMU's process, memory and limits."""
