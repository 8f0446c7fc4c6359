# SPDX-License-Identifier: GPL-2.0-or-later
"""Start QEMU with the plugin loaded, for the ``qemu-prefault run`` command."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn

from ..errors import Code, InputError, UnsupportedError
from ..host.executable import is_static, script_interpreter
from .plugin import plugin_path

OPTIONS_VARIABLE = "QEMU_PREFAULT_OPTIONS"
OPTIONS = ("keep", "populate", "vcpu", "start", "rate", "quirk", "hold", "socket", "log")
#: Wrappers that pass their environment to the program that they execute.
WRAPPERS: Final = frozenset(
    {
        *("chrt", "env", "ionice", "nice", "nohup", "numactl", "prlimit", "setarch", "setpriv"),
        *("setsid", "stdbuf", "taskset", "time", "timeout"),
    }
)
#: Wrappers that change the environment, or that ask another process to start the program.
CLEARING_WRAPPERS: Final = frozenset(
    {
        *("doas", "pkexec", "runuser", "su", "sudo"),
        *("machinectl", "run0", "systemd-run"),
        *("docker", "flatpak", "nerdctl", "podman", "ssh"),
    }
)


def replace_by(
    command: Sequence[str],
    options: Sequence[str],
    *,
    warn: Callable[[str], None] | None = None,
) -> NoReturn:
    """Replace this process with QEMU, and load the plugin with ``LD_PRELOAD``.

    :param command: QEMU's command line.
    :param options: The plugin's options in the form ``KEY=VALUE``.
    :param warn: A function that receives a warning if QEMU might start without the plugin. If this
        argument is None, the function reports no warnings.
    :raises InputError: If the program does not exist, or if the plugin does not support an
        option.
    :raises UnsupportedError: If ``LD_PRELOAD`` cannot load the plugin into the program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise InputError(
            f"{command[0]} is not an executable program",
            "specify QEMU's command line after --, for example "
            "qemu-prefault run -- qemu-system-x86_64 …",
        )
    check_plugin_options(options)
    for started in (program, *_wrapped_programs(command)):
        _refuse_privileged(started)
        _refuse_static(started)
    for doubt in _doubts(command, program):
        if warn is not None:
            warn(f"QEMU might start without the plugin, because {doubt}")
    plugin = os.fspath(plugin_path())
    if any(mark in plugin for mark in ": "):
        raise UnsupportedError(
            f"LD_PRELOAD cannot load {plugin}, because the path contains a space or a colon",
            "install qemu-prefault in another directory, or start QEMU with "
            '-plugin "$(qemu-prefault plugin-path)"',
        )
    before = os.environ.get("LD_PRELOAD")
    environment = {**os.environ, "LD_PRELOAD": f"{plugin}:{before}" if before else plugin}
    if options:
        environment[OPTIONS_VARIABLE] = ",".join(options)
    # The caller runs QEMU with their own privileges.
    os.execve(program, list(command), environment)  # nosec B606


def check_plugin_options(options: Sequence[str]) -> None:
    """Check the syntax and the keys of the plugin's options.

    :raises InputError: If an option does not have the form ``KEY=VALUE``, if the option contains a
        comma, or if the plugin does not support the key.
    """
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or key not in OPTIONS or "," in option:
            raise InputError(
                f"{option!r} is not a valid plugin option",
                f"write KEY=VALUE without a comma, with one of the keys {', '.join(OPTIONS)}",
            )


def _refuse_privileged(program: str) -> None:
    """Raise an error if the program runs with elevated privileges.

    For such a program, the dynamic linker ignores LD_PRELOAD (AT_SECURE, ld.so(8)).
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
            f"the dynamic linker ignores LD_PRELOAD, because {program} is set-uid or set-gid, or "
            "has file capabilities",
            'start QEMU with -plugin "$(qemu-prefault plugin-path)" instead',
            code=Code.SECURE_EXECUTION,
        )


def _refuse_static(program: str) -> None:
    """Raise an error if the program is statically linked.

    Only the dynamic linker ld.so reads LD_PRELOAD.
    """
    if is_static(program):
        raise UnsupportedError(
            f"{program} is statically linked, so it cannot load the plugin",
            "use a dynamically linked QEMU, or run qemu-prefault --qmp SOCKET after QEMU has "
            "started\n"
            f"if {os.path.basename(program)} starts QEMU, put 'qemu-prefault run --' before "
            "QEMU's own command line instead",
            code=Code.STATIC_PROGRAM,
        )


def _wrapped_programs(command: Sequence[str]) -> Iterator[str]:
    """Yield the path of QEMU if a known wrapper starts QEMU."""
    if os.path.basename(command[0]) not in WRAPPERS:
        return
    for word in command[1:]:
        name = os.path.basename(word)
        found = shutil.which(word) if "qemu" in name or "kvm" in name else None
        if found is not None:
            yield found
            return


def _doubts(command: Sequence[str], program: str) -> Iterator[str]:
    """Yield the reasons why QEMU might start without the plugin."""
    interpreter = script_interpreter(program)
    if interpreter is not None and is_static(interpreter):
        yield f"{program} is a script for {interpreter}, which is statically linked"
    for number, word in enumerate(command):
        name = os.path.basename(word)
        if number and ("qemu" in name or "kvm" in name):
            return
        if name in CLEARING_WRAPPERS:
            yield f"{name} might start QEMU without LD_PRELOAD"
            return
        if name == "env" and _env_clears(command[number + 1 :]):
            yield "env removes LD_PRELOAD from the environment"
            return
        if number == 0 and name not in WRAPPERS:
            return


def _env_clears(arguments: Sequence[str]) -> bool:
    """Return whether env(1) with these arguments removes the plugin from LD_PRELOAD."""
    words = list(arguments)
    while words and (words[0].startswith("-") or "=" in words[0]):
        word = words.pop(0)
        if word in ("-u", "--unset", "-C", "--chdir") and words:
            word += f"={words.pop(0)}"
        short = not word.startswith(("--", "-u", "-C", "-S")) and word.startswith("-")
        if word in ("-", "--ignore-environment") or (short and "i" in word):
            return True
        if word in ("-u=LD_PRELOAD", "-uLD_PRELOAD", "--unset=LD_PRELOAD"):
            return True
        if word.startswith("LD_PRELOAD="):
            return "qemu-prefault-plugin" not in word
    return False
