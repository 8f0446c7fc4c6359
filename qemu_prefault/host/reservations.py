# SPDX-License-Identifier: GPL-2.0-or-later
"""Reserve the memory that each run on this host still has to populate.

If several runs start at the same time, each run can find enough free memory for itself, but the
memory may be too little for all of them. Therefore each run subtracts the reservations of the other
runs.

Each run has a file in :data:`DIRECTORY` and holds a lock on the file (flock(2)). The file contains
the number of bytes that the run still has to allocate from each limit. When the run ends or is
killed, the kernel releases the lock. A reservation does not allocate memory. Therefore a run also
reads the limits again before each batch.
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

#: Only root can write below /run. If another user starts a run, the run makes no reservation.
DIRECTORY: Final = Path("/run/qemu-prefault/runs")
#: Seconds after which a check continues although another process holds the lock.
LOCK_SECONDS: Final = 2.0
_LOCK = "lock"
_LONGEST = 1 << 16


class Reservation:
    """The number of bytes that one run still has to allocate from each limit.

    This context manager removes the reservation at the end of the block. If this process cannot use
    :data:`DIRECTORY`, it makes no reservation and ignores the reservations of other runs.
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
        """Lock the reservations within the block, and yield the other runs' totals.

        Other runs wait for the lock before they check the limits. If another run holds the lock for
        :data:`LOCK_SECONDS`, this run continues without the lock. The keys of the result are those
        of :attr:`.Limit.key`, and the values are in bytes.
        """
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
        """Reserve bytes from each limit for this run.

        The caller must call this method in the block of :meth:`check`.
        """
        self._needs = dict(needs)
        with contextlib.suppress(OSError):
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write()

    def take(self, taken: Mapping[str, int]) -> None:
        """Reduce the reservation by the bytes that this run has populated."""
        for name, size in taken.items():
            if name in self._needs:
                self._needs[name] = max(0, self._needs[name] - size)
        with contextlib.suppress(OSError):
            self._write()

    def release(self) -> None:
        """Set the reservation to 0 bytes for each limit."""
        self.take(dict(self._needs))

    def _write(self) -> None:
        if self._fd >= 0:
            text = json.dumps(self._needs).encode()
            # Pad the text with spaces, so that the end of a longer old text does not remain.
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
    """Lock a file, or return without the lock after a time limit in seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)


def _read_reservation(path: Path) -> dict[str, int]:
    """Return the reservation in another run's file.

    If that run has ended, remove the file and return an empty map.
    """
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
