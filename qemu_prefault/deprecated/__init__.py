# SPDX-License-Identifier: GPL-2.0-or-later
"""What 0.1 had at other places: it works in 0.2, with a DeprecationWarning, and ends with it.

``session`` has ``qemu_prefault.Session`` and ``qemu_prefault.Policy``. ``survey`` and
``scripting`` are found as ``qemu_prefault.survey`` and ``qemu_prefault.scripting``, because
this folder is on the package's ``__path__``; so is ``lab``, which says where it went.
"""
