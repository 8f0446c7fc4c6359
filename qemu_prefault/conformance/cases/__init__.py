# SPDX-License-Identifier: GPL-2.0-or-later
"""The cases, a module for each topic. File names are as in arch/x86/kvm unless said otherwise."""
