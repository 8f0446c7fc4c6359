# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's facts about KVM and about QEMU's process, memory and limits."""
