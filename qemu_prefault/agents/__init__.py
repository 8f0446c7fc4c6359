# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents issue the calls inside QEMU: by ptrace, by the plugin, or as jobs of a patched QEMU."""
