# SPDX-License-Identifier: GPL-2.0-or-later
"""The cases, a module or two per area. File names are as in arch/x86/kvm unless said otherwise."""
