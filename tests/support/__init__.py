# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that the tests share: the tool, QEMU, guests, libvirt, and a guest's health.

Tests import this package as ``support``. :mod:`support.tool` and :mod:`support.health` need only
the product and the standard library, so other test runners can use them as well.
"""
