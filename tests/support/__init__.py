# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the tool, QEMU, guests and libvirt domains for the tests, and inspect them.

Tests import this package as ``support``. :mod:`support.tool` and :mod:`support.health` need only
the product and the standard library, so other test runners can use them as well.
"""
