# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests share: the tool as a process, QEMU, guests, libvirt, a guest's health.

Test modules import it as ``support``. :mod:`support.tool` and :mod:`support.health` need only
the product and the standard library, so that other test runners can use them.
"""
