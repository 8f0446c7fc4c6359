# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and modules of version 0.1 that have been renamed.

The old names still work in version 0.2, but raise a DeprecationWarning. They will be removed in the
next version. ``session`` defines ``qemu_prefault.Session`` and ``qemu_prefault.Policy``. This
directory is on the package's ``__path__``, so ``survey``, ``scripting`` and ``lab`` are also
importable as ``qemu_prefault.survey``, ``qemu_prefault.scripting`` and ``qemu_prefault.lab``.
"""
