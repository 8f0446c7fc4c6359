# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and modules of version 0.1 that have moved.

They work in version 0.2 with a DeprecationWarning, and are removed after it. ``session`` defines
``qemu_prefault.Session`` and ``qemu_prefault.Policy``. ``survey``, ``scripting`` and ``lab`` are
importable as ``qemu_prefault.survey`` and so on, because this directory is on the package's
``__path__``.
"""
