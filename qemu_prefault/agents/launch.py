# SPDX-License-Identifier: GPL-2.0-or-later
"""Start QEMU with the plugin loaded (``qemu-prefault run``)."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from typing import NoReturn

from ..errors import Code, InputError, UnsupportedError
from .plugin import plugin_path

OPTIONS_VARIABLE = "QEMU_PREFAULT_OPTIONS"
OPTIONS = ("keep", "populate", "quirk", "hold", "socket", "log")


def replace_by(command: Sequence[str], options: Sequence[str]) -> NoReturn:
    """Replace this process by QEMU, with the plugin in ``LD_PRELOAD``.

    :param command: QEMU's command line.
    :param options: The plugin's options, each ``KEY=VALUE``.
    :raises InputError: if the program does not exist, or the plugin does not know an option.
    :raises UnsupportedError: if ``LD_PRELOAD`` cannot load the plugin into the program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise InputError(
            f"{command[0]} is not an executable program",
            "give QEMU's command line after --, e.g.: qemu-prefault run -- qemu-system-x86_64 …",
        )
    check_plugin_options(options)
    _refuse_privileged(program)
    plugin = os.fspath(plugin_path())
    if any(mark in plugin for mark in ": "):
        raise UnsupportedError(
            f"LD_PRELOAD cannot load {plugin}: the path contains a space or a colon",
            'install it elsewhere, or use QEMU\'s -plugin "$(qemu-prefault plugin-path)"',
        )
    before = os.environ.get("LD_PRELOAD")
    environment = {**os.environ, "LD_PRELOAD": f"{plugin}:{before}" if before else plugin}
    if options:
        environment[OPTIONS_VARIABLE] = ",".join(options)
    os.execve(program, list(command), environment)


def check_plugin_options(options: Sequence[str]) -> None:
    """Check the syntax and the keys of the plugin's options.

    :raises InputError: if an option is not ``KEY=VALUE`` with a key that the plugin knows.
    """
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or key not in OPTIONS or "," in option:
            raise InputError(
                f"the plugin has no option {option!r}",
                f"write KEY=VALUE; the keys are: {', '.join(OPTIONS)}",
            )


def _refuse_privileged(program: str) -> None:
    """Raise an error if executing the program raises privileges.

    The dynamic linker then ignores LD_PRELOAD (AT_SECURE, ld.so(8)).
    """
    mode = os.stat(program).st_mode
    try:
        capabilities = os.getxattr(program, "security.capability")
    except OSError:
        capabilities = b""
    raised = (mode & stat.S_ISUID and os.geteuid() != os.stat(program).st_uid) or (
        mode & stat.S_ISGID and os.getegid() != os.stat(program).st_gid
    )
    if raised or (capabilities and os.geteuid() != 0):
        raise UnsupportedError(
            f"{program} is set-uid or has file capabilities: the dynamic linker ignores "
            "LD_PRELOAD for it",
            'use QEMU\'s own option instead: -plugin "$(qemu-prefault plugin-path)"',
            code=Code.SECURE_EXECUTION,
        )
