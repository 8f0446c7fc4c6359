# SPDX-License-Identifier: GPL-2.0-or-later
"""The cases of the suite, in one or two modules per area.

The file names in a case's ``source`` are relative to arch/x86/kvm or to the root of the kernel
tree.
"""
