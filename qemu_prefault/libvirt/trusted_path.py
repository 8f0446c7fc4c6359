# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that only root can change the program that a path names.

libvirt's hook and systemd run programs as root, and QEMU loads the plugin. If another user can
replace such a file, or a directory above it, that user's code runs as root or in QEMU.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ..errors import Code, RefusedError

#: Maximum number of symbolic links in a path, as in the kernel (MAXSYMLINKS).
_MOST_LINKS: Final = 40
#: The owners of trusted files.
ROOT_ONLY: Final = frozenset({0})


def check_trusted(path: Path, owners: frozenset[int] = ROOT_ONLY) -> None:
    """Check every component of a path from / on, and the targets of symbolic links.

    Components that do not exist are not checked, because only the owner of the directory above them
    can create them. A directory with the sticky bit counts as writable, because every user can
    create a file in it.

    :param path: An absolute path.
    :param owners: The user ids that may own a component.
    :raises RefusedError: If another user owns a component, or if the group or others may write to
        it (code ``untrusted-path``).
    """
    _check(path, path, owners, set(), [_MOST_LINKS])


def _check(
    path: Path, whole: Path, owners: frozenset[int], seen: set[Path], links: list[int]
) -> None:
    # Not os.path.normpath(): ".." after a symbolic link is relative to the target of the link.
    here = Path("/")
    parts = [part for part in path.parts[1:] if part != "."]
    _check_component(here, whole, owners, seen)
    while parts:
        part = parts.pop(0)
        here = here.parent if part == ".." else here / part
        if part == "..":
            continue
        try:
            found = _check_component(here, whole, owners, seen)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(found.st_mode):
            links[0] -= 1
            if links[0] < 0:
                raise _refusal(here, whole, "is one of too many symbolic links")
            target = Path(os.readlink(here))
            if target.is_absolute():
                here = Path("/")
                parts = [*target.parts[1:], *parts]
            else:
                here = here.parent
                parts = [*target.parts, *parts]


def _check_component(
    path: Path, whole: Path, owners: frozenset[int], seen: set[Path]
) -> os.stat_result:
    found = os.lstat(path)
    if path in seen:
        return found
    if found.st_uid not in owners:
        raise _refusal(path, whole, f"belongs to user {found.st_uid}")
    if not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "every user" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise _refusal(path, whole, f"can be changed by {who}")
    seen.add(path)
    return found


def _refusal(path: Path, whole: Path, why: str) -> RefusedError:
    text = f"{path} {why}" if path == whole else f"{whole} cannot be trusted, because {path} {why}"
    return RefusedError(
        text,
        "only root may be able to change this path. Install qemu-prefault as root in a directory "
        f"such as /opt, or run: chown root {path} && chmod go-w {path}",
        code=Code.UNTRUSTED_PATH,
    )


def check_program(words: Sequence[str]) -> None:
    """Check the program that a command starts, and the Python code that it runs.

    :param words: The command. Only words that are absolute paths are checked.
    :raises RefusedError: If another user than root can change the program or the code.
    """
    seen: set[Path] = set()
    for path in _code(words):
        _check(path, path, ROOT_ONLY, seen, [_MOST_LINKS])


def _code(words: Sequence[str]) -> Iterator[Path]:
    yield from (Path(word) for word in words if word.startswith("/"))
    with contextlib.suppress(OSError), open(words[0], "rb") as script:
        first = script.readline(4096).split()
        if first and first[0].startswith(b"#!/"):
            yield Path(os.fsdecode(first[0].removeprefix(b"#!")))
    if sys.executable:
        yield Path(sys.executable)
    # Each loaded module shows a directory from which the program loads code as root.
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.startswith("/"):
            yield Path(file)
    package = Path(__file__).resolve().parent.parent
    for directory, names, files in os.walk(package):
        yield from (Path(directory, name) for name in [*names, *files])
