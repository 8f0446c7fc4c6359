# SPDX-License-Identifier: GPL-2.0-or-later
"""The agents, which make system calls inside QEMU (attach, plugin and qmp)."""
