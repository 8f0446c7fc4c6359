# SPDX-License-Identifier: GPL-2.0-or-later
"""The flags with which setup.py builds the plugin and build.py builds the extension module.

The helper has its own flags in build.py: it runs without libc and without thread-local storage.
"""

from __future__ import annotations

import os

#: Fortified functions hide some errors from the address sanitizer.
_FORTIFY = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
_SANITIZED = "-fsanitize=" in os.environ.get("CFLAGS", "")

COMPILE_FLAGS = [
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wformat", "-Wformat-security"),
    *("-fvisibility=hidden", "-fstack-protector-strong", "-fstack-clash-protection"),
    *("-fcf-protection=full", *([] if _SANITIZED else _FORTIFY)),
]
LINK_FLAGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,-z,separate-code"]
