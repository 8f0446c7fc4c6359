# SPDX-License-Identifier: GPL-2.0-or-later
"""Agents issue system calls inside QEMU by ptrace, the plugin or QEMU's jobs."""
