# SPDX-License-Identifier: GPL-2.0-or-later
"""The attach, plugin and qmp agents, which make system calls inside QEMU."""
