# SPDX-License-Identifier: GPL-2.0-or-later
"""The old names and modules of version 0.1 that version 0.2 renamed.

The old names still work in version 0.2, but cause a DeprecationWarning. They will be removed in the
next version. ``session`` defines ``qemu_prefault.Session`` and ``qemu_prefault.Policy``. This
directory is on the package's ``__path__``. Therefore ``survey``, ``scripting`` and ``lab`` can also
be imported as ``qemu_prefault.survey``, ``qemu_prefault.scripting`` and ``qemu_prefault.lab``.
"""
