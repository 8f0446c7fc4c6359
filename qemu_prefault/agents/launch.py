# SPDX-License-Identifier: GPL-2.0-or-later
"""Start QEMU with the plugin in it: ``qemu-prefault run``."""

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
    """Become QEMU, with ``LD_PRELOAD`` naming the plugin.

    :param options: the plugin's, each ``KEY=VALUE``.
    :raise InputError: no such program, or no such option.
    :raise UnsupportedError: the program ignores ``LD_PRELOAD``.
    """
    program = shutil.which(command[0])
    if program is None:
        raise InputError(
            f"{command[0]} is no program that could be run here",
            "give QEMU's command line behind --, e.g.: qemu-prefault run -- qemu-system-x86_64 …",
        )
    check_plugin_options(options)
    _refuse_privileged(program)
    plugin = os.fspath(plugin_path())
    if any(mark in plugin for mark in ": "):
        raise UnsupportedError(
            f"LD_PRELOAD cannot name {plugin}: its path has a space or a colon",
            'install it elsewhere, or use QEMU\'s -plugin "$(qemu-prefault plugin-path)"',
        )
    before = os.environ.get("LD_PRELOAD")
    environment = {**os.environ, "LD_PRELOAD": f"{plugin}:{before}" if before else plugin}
    if options:
        environment[OPTIONS_VARIABLE] = ",".join(options)
    os.execve(program, list(command), environment)


def check_plugin_options(options: Sequence[str]) -> None:
    """
    :raise InputError: one is no ``KEY=VALUE`` that the plugin knows.
    """
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or key not in OPTIONS or "," in option:
            raise InputError(
                f"{option!r} is no option of the plugin",
                f"write KEY=VALUE; the keys are: {', '.join(OPTIONS)}",
            )


def _refuse_privileged(program: str) -> None:
    """The dynamic linker ignores LD_PRELOAD where executing raises privileges (AT_SECURE)."""
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
