# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel says about QEMU: its process, descriptors, memory and limits; and about KVM."""
