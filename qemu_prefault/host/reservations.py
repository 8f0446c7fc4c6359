# SPDX-License-Identifier: GPL-2.0-or-later
"""Record what each run on this host still has to populate, so that later runs leave it free.

Without this, several runs start if the memory is enough for each of them but not for all, and all
of them run short. Each run has a file in :data:`DIRECTORY`, with the bytes that it still takes of
each limit, and holds a lock on it (flock(2)). The kernel drops the lock when the run ends in any
way. This is advisory: a run reads the limits again before each batch in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

#: Only root can write below /run. Runs of other users take no part.
DIRECTORY: Final = Path("/run/qemu-prefault/runs")
#: Seconds after which a check continues although another process holds the lock.
LOCK_SECONDS: Final = 2.0
_LOCK = "lock"
_LONGEST = 1 << 16


class Reservation:
    """The bytes that one run still takes of each limit, by the limit's name.

    A context manager that removes the reservation at its end. If :data:`DIRECTORY` cannot be used,
    nothing is recorded, and no other reservation is known.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._path = DIRECTORY / f"{os.getpid()}-{time.monotonic_ns()}"
        self._needs: dict[str, int] = {}

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def check(self) -> Iterator[dict[str, int]]:
        """Keep other runs from checking limits at the same time; yield what they have reserved."""
        with contextlib.ExitStack() as stack:
            try:
                DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(DIRECTORY / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, lock)
                _lock_within(lock, LOCK_SECONDS)
                others = self._read_others()
            except OSError:
                others = {}
            yield others

    def reserve(self, needs: Mapping[str, int]) -> None:
        """Record what this run takes. Call this within :meth:`check`."""
        self._needs = dict(needs)
        with contextlib.suppress(OSError):
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write()

    def take(self, taken: Mapping[str, int]) -> None:
        """Reduce the reservation by bytes that have been populated."""
        for name, size in taken.items():
            if name in self._needs:
                self._needs[name] = max(0, self._needs[name] - size)
        with contextlib.suppress(OSError):
            self._write()

    def release(self) -> None:
        """Reduce the reservation to nothing."""
        self.take(dict(self._needs))

    def _write(self) -> None:
        if self._fd >= 0:
            text = json.dumps(self._needs).encode()
            # A reader sees the old or the new text: its padding hides the end of a longer one.
            os.pwrite(self._fd, text.ljust(os.fstat(self._fd).st_size), 0)

    def _read_others(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for path in DIRECTORY.iterdir():
            if path.name in (_LOCK, self._path.name):
                continue
            for name, size in _read_reservation(path).items():
                total[name] = total.get(name, 0) + size
        return total


def _lock_within(fd: int, seconds: float) -> None:
    """Lock a file. After the time limit, return without the lock."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)


def _read_reservation(path: Path) -> dict[str, int]:
    """Return a run's reservation. If the run has ended, remove its file and return nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            path.unlink()
            return {}
        found = json.loads(os.pread(fd, _LONGEST, 0))
    except (OSError, ValueError):
        return {}
    finally:
        os.close(fd)
    if not isinstance(found, dict):
        return {}
    return {name: size for name, size in found.items() if isinstance(size, int) and size > 0}
