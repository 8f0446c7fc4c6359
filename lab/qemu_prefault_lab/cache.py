# SPDX-License-Identifier: GPL-2.0-or-later
"""A cache of files that take a long time to build, such as images.

An entry is a directory ``<name>-<key>``. The key is a hash of all inputs. If an input changes, the
lab builds a new entry. Entries are never updated in place. A builder works in a ``tmp-`` directory
and renames this directory when the entry is complete. If the builder is killed, the next builder of
the same name removes the ``tmp-`` directory. A file lock per name prevents two builders from
building the same entry. Another user must not be able to change the cache
(:mod:`qemu_prefault_lab.cache_directory`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qemu_prefault.errors import InputError

from . import cache_directory

_KEY_LENGTH = 16
_ENTRIES = (
    "avocado-",
    "bin-",
    "bochs-",
    "distro-",
    "docs-",
    "files-",
    "image-",
    "l2-",
    "qemu-",
    "snapshot-",
    "tcg-host-",
    "tmp-",
)


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Raise InputError if the cache is not safe or cannot be created."""
    try:
        yield
    except cache_directory.UntrustedCacheError as error:
        raise InputError(error.cause, error.remedy) from error
    except OSError as error:
        raise InputError(
            f"cannot use the cache directory: {error}",
            "set QEMU_PREFAULT_CACHE to a directory with about 3 GB of free space",
        ) from error


def cache_dir() -> Path:
    """Return ``$QEMU_PREFAULT_CACHE``, or the default in the XDG cache directory.

    :raises InputError: If another user could change the directory, or it cannot be created.
    """
    with _input_errors():
        return cache_directory.locate()


def subdirectory(*names: str) -> Path:
    """Return a directory in the cache that is not an entry, created if missing.

    :raises InputError: If another user could have filled the directory.
    """
    with _input_errors():
        return cache_directory.directory(*names)


def _exists(path: Path) -> bool:
    with _input_errors():
        return cache_directory.is_ours(path)


def key_of(*parts: str | bytes) -> str:
    """Return a hash of the inputs.

    The hash includes the length of each input. Otherwise ``("ab", "c")`` and ``("a", "bc")`` would
    have the same hash.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:_KEY_LENGTH]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of this name within the block.

    The lock excludes all other threads and processes.
    """
    with _input_errors():
        lock = cache_directory.open_lock(cache_directory.directory("locks") / name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def entry(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the directory of an entry.

    Build the entry if it is missing.

    :param build: A function that fills the empty directory passed to it. If the function raises an
        exception, the directory is removed.
    """
    root = cache_dir()
    final = root / f"{name}-{key}"
    if _exists(final):
        os.utime(final)  # prune() removes entries by their modification time
        return final
    with locked(name):
        if _exists(final):
            return final
        for stale in root.glob(f"tmp-{name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"tmp-{name}-", dir=root))
        try:
            scratch.chmod(0o755)
            build(scratch)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def discard(path: Path) -> None:
    """Remove an invalid entry, so that the next user of the entry builds it again.

    This function renames the entry first, so that no process uses a partly removed directory.
    """
    doomed = path.with_name(f"tmp-{path.name}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def prune(days: float) -> list[Path]:
    """Remove entries that have not been used recently, and return their paths.

    A running lab is not affected, because it keeps its files open.
    """
    oldest = time.time() - days * 86400
    gone = []
    for path in sorted(cache_dir().iterdir()):
        # Skip other programs' entries, whose modification times do not show when they were used.
        if not path.name.startswith(_ENTRIES):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if path.is_dir() and path.stat().st_mtime < oldest:
                discard(path)
                gone.append(path)
    return gone
