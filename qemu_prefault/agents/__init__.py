# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents issue the system calls inside QEMU, by ptrace, the plugin or a patched QEMU's jobs."""
