# SPDX-License-Identifier: GPL-2.0-or-later
"""Things that are slow to make and never change once made.

An entry is a directory ``<name>-<key>`` where the key is a hash of everything that goes
in, so a changed recipe is a new entry and never an entry to repair. It appears by one
rename: whoever is killed half-way leaves only a ``tmp-`` directory, which the next
builder of the same name removes. A file lock per name makes two builders one.
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

_KEY_LENGTH = 16
_ENTRIES = (
    "avocado-",
    "bin-",
    "distro-",
    "files-",
    "image-",
    "l2-",
    "qemu-",
    "snapshot-",
    "tcg-host-",
    "tmp-",
)


def cache_dir() -> Path:
    """Where the lab keeps its images: ``$QEMU_PREFAULT_CACHE`` or the XDG cache."""
    if configured := os.environ.get("QEMU_PREFAULT_CACHE"):
        path = Path(configured)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "qemu-prefault"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the cache directory {path}: {error.strerror}",
            "set QEMU_PREFAULT_CACHE to a directory with about 3 GB to spare",
        ) from error
    return path.resolve()


def key_of(*parts: str | bytes) -> str:
    """Hash what goes into an entry; the lengths keep two neighbours from blending."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:_KEY_LENGTH]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Nobody else is in here under the same name, in this process or another."""
    path = cache_dir() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def entry(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the directory of an entry; call ``build`` with an empty one if it is missing.

    :param build: fills the directory it is given. Raising leaves nothing behind.
    """
    root = cache_dir()
    final = root / f"{name}-{key}"
    if final.is_dir():
        os.utime(final)  # what is in use is not pruned
        return final
    with locked(name):
        if final.is_dir():
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
    """Remove an entry found to be bad, so that it is built again.

    Renamed first: a half-removed directory must not be taken for an entry.
    """
    doomed = path.with_name(f"tmp-{path.name}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def prune(days: float) -> list[Path]:
    """Remove what nobody has used for so long; give what is gone.

    A running lab is not harmed: it has its files open.
    """
    oldest = time.time() - days * 86400
    gone = []
    for path in sorted(cache_dir().iterdir()):
        # Others keep things in the same directory, and do not mark what they use.
        if not path.name.startswith(_ENTRIES):
            continue
        with contextlib.suppress(FileNotFoundError):  # another pruner
            if path.is_dir() and path.stat().st_mtime < oldest:
                discard(path)
                gone.append(path)
    return gone
