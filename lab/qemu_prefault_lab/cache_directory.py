# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the cache directory, and refuse one that another user could change.

The cache contains programs that later runs execute, often as root. The cache is therefore used only
if it belongs to the current user, if no other user can write to it, and if no other user can
replace a directory or symbolic link on the path to it. The same rule applies to the directories and
lock files in the cache.

scripts/with-env runs this file as a program before any package is installed. The file therefore
imports only the standard library.

    cache_directory.py path            print the cache directory, created if missing
    cache_directory.py directory NAME  print a directory in the cache, created if missing
    cache_directory.py lock NAME       print a lock file in the cache, created if missing
    cache_directory.py layer NAME      exit with 0 if the layer is complete, 1 if it is not

The exit status is 4 if the cache is refused.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import sys
from pathlib import Path

REFUSED = 4
_LINKS_MAX = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UntrustedCacheError(Exception):
    """A refusal to use the cache, with the cause and the remedy."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _problem(status: os.stat_result, *owners: int) -> str:
    """Return why a directory or file of the cache is not trusted, or ""."""
    if status.st_uid not in owners:
        return f"belongs to {_name(status.st_uid)}"
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OTHERS_WRITE:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, so other users can write to it"
    return ""


def _check_path(path: Path) -> Path:
    """Check each directory and symbolic link up to ``path``, and create what is missing.

    :returns: The path without symbolic links.
    """
    euid = os.geteuid()
    pending = list(reversed(path.absolute().parts[1:]))
    reached = Path("/")
    links = 0
    while True:
        status = reached.lstat()
        # In a sticky directory, other users cannot rename or remove the entries of this user.
        sticky = status.st_mode & stat.S_ISVTX and status.st_uid in (0, euid)
        problem = "" if sticky and pending else _problem(status, 0, euid)
        if problem:
            remedy = "set QEMU_PREFAULT_CACHE to a directory that only you can change"
            if status.st_uid == euid:
                remedy += f",\nor remove {path} and run: chmod go-w {reached}"
            raise UntrustedCacheError(
                f"the cache directory {path} is not safe, because {reached} {problem}", remedy
            )
        if not pending:
            return reached
        part = pending.pop()
        if part == "..":
            reached = reached.parent
            continue
        following = reached / part
        try:
            status = following.lstat()
        except FileNotFoundError:
            following.mkdir(mode=0o700, exist_ok=True)
            status = following.lstat()
        if not stat.S_ISLNK(status.st_mode):
            reached = following
            continue
        links += 1
        if links > _LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if problem := _problem(status, 0, euid):
            raise UntrustedCacheError(
                f"the cache directory {path} is not safe, because the link {following} {problem}",
                "set QEMU_PREFAULT_CACHE to a directory that only you can change",
            )
        target = Path(os.readlink(following))
        pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        reached = Path("/") if target.is_absolute() else reached


def _default() -> Path:
    """Return the default cache directory.

    If ``sudo`` keeps HOME, the default is in the home directory of the user who called sudo. Root
    then uses its own home directory, because the user can write to theirs.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.geteuid() == 0:
        existing = base
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        owner = existing.stat().st_uid
        if owner != 0:
            own = Path(pwd.getpwuid(0).pw_dir) / ".cache" / "qemu-prefault"
            print(
                f"setup: {base} belongs to {_name(owner)}, so root uses the cache {own}",
                file=sys.stderr,
            )
            return own
    return base / "qemu-prefault"


def locate() -> Path:
    """Return ``$QEMU_PREFAULT_CACHE``, or the default in the XDG cache directory.

    The variable is set to the result, so that child processes use the same cache.

    :raises UntrustedCacheError: If another user could change the cache.
    :raises OSError: If the directory cannot be created.
    """
    configured = os.environ.get("QEMU_PREFAULT_CACHE")
    path = _check_path(Path(configured) if configured else _default())
    if (owner := path.stat().st_uid) != os.geteuid():
        raise UntrustedCacheError(
            f"the cache directory {path} belongs to {_name(owner)}",
            "set QEMU_PREFAULT_CACHE to a directory of your own",
        )
    os.environ["QEMU_PREFAULT_CACHE"] = str(path)
    return path


def _refuse(path: Path, problem: str) -> UntrustedCacheError:
    return UntrustedCacheError(
        f"{path} in the cache {problem}",
        f"another user may have changed the cache, so remove it: rm -r {path.parent}",
    )


def is_ours(path: Path) -> bool:
    """Return whether a directory in the cache exists.

    :raises UntrustedCacheError: If another user could have filled the directory.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        raise _refuse(path, "is not a directory")
    if problem := _problem(status, os.geteuid()):
        raise _refuse(path, problem)
    return True


def directory(*names: str) -> Path:
    """Return a directory in the cache, created if missing.

    :raises UntrustedCacheError: If another user could have filled the directory.
    """
    path = locate()
    for name in names:
        path /= name
        if not is_ours(path):
            path.mkdir(mode=0o700, exist_ok=True)
    return path


def open_lock(path: Path) -> int:
    """Open a lock file in the cache, created if missing, and return the descriptor.

    :raises UntrustedCacheError: If the file is a link or another user could have created it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise _refuse(path, "is a symbolic link") from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        problem = f"belongs to {_name(status.st_uid)}"
    elif not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        problem = "is not a lock file"
    else:
        return fd
    os.close(fd)
    raise _refuse(path, problem)


def is_complete(layer: Path) -> bool:
    """Return whether scripts/with-env finished building a layer.

    :raises UntrustedCacheError: If another user could have built the layer.
    """
    if not is_ours(layer):
        return False
    try:
        status = (layer / "complete").lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):
        raise _refuse(layer, "contains a file 'complete' that is not a regular file")
    if problem := _problem(status, os.geteuid()):
        raise _refuse(layer, f"contains a file 'complete' that {problem}")
    return True


def main(arguments: list[str]) -> int:
    os.umask(0o022)
    try:
        match arguments:
            case ["path"]:
                print(locate())
            case ["directory", name]:
                print(directory(*Path(name).parts))
            case ["lock", name]:
                path = locate() / name
                os.close(open_lock(path))
                print(path)
            case ["layer", name]:
                return 0 if is_complete(locate() / name) else 1
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except UntrustedCacheError as error:
        print(f"error: {error.cause}", file=sys.stderr)
        print("  " + error.remedy.replace("\n", "\n  "), file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"error: cannot use the cache: {error}", file=sys.stderr)
        print("  set QEMU_PREFAULT_CACHE to a directory that you can create", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
