# SPDX-License-Identifier: GPL-2.0-or-later
"""Read files whose contents QEMU controls, with a limit on the number of bytes.

QEMU can make the files in its own ``/proc/PID`` large. For example, ``prctl(PR_SET_MM_MAP)`` needs
no privilege and moves the memory that ``/proc/PID/cmdline`` shows. A QEMU that its guest has taken
over could therefore make this process allocate any amount of memory. All code that reads such files
or such memory uses :func:`read_bounded` or :func:`pread_bounded`.
"""

from __future__ import annotations

import errno
import itertools
import os
from typing import Final

#: Limits in bytes. The kernel limits the arguments of an ordinary program to 2 MiB, because the
#: default stack limit is 8 MiB (bprm_stack_limits(), fs/exec.c). 65,530 mappings
#: (vm.max_map_count) with short paths need 5 MiB in maps, and 9 MiB in numa_maps. The kernel limits
#: status to about 720 KiB, which 65,536 supplementary groups need.
DEFAULT_LIMIT: Final = 1 << 20
_LIMITS: Final = {
    "cmdline": 2 << 20,
    "maps": 8 << 20,
    "numa_maps": 16 << 20,
    "mountinfo": 4 << 20,
}
#: Maximum number of entries of a directory, for example of threads or of file descriptors.
MAX_ENTRIES: Final = 1 << 16
#: Maximum size in bytes of one read of a process's memory or of a KVM descriptor.
MAX_PREAD: Final = 2 << 20
_BLOCK: Final = 1 << 18


def limit_of(path: str) -> int:
    """Return the limit in bytes for the file at ``path``, which depends on the file's name."""
    return _LIMITS.get(path.rpartition("/")[2], DEFAULT_LIMIT)


def too_large(name: str, limit: int, unit: str = "bytes") -> OSError:
    """Return the error (EFBIG) for a file or a directory that exceeds its limit."""
    return OSError(errno.EFBIG, f"it has more than {limit} {unit}", name)


def read_bounded(source: str | int, limit: int) -> bytes:
    """Return the contents of a file, which has at most ``limit`` bytes.

    The function does not wait for a writer if the file is a FIFO.

    :param source: A path, or a file descriptor that this function does not close.
    :raises OSError: If the file cannot be read. The errno is EFBIG if the file is larger.
    """
    if isinstance(source, int):
        return _read_all(source, limit, f"descriptor {source}")
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return _read_all(fd, limit, source)
    finally:
        os.close(fd)


def _read_all(fd: int, limit: int, name: str) -> bytes:
    blocks: list[bytes] = []
    left = limit + 1
    while left > 0:
        block = os.read(fd, min(left, _BLOCK))
        if not block:
            return b"".join(blocks)
        blocks.append(block)
        left -= len(block)
    raise too_large(name, limit)


def pread_bounded(fd: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes of a file at ``offset``, or fewer at the end of the file.

    :param size: At most :data:`MAX_PREAD`.
    :raises OSError: If the file cannot be read. The errno is EFBIG if ``size`` is larger, and
        EINVAL if the offset is not valid.
    """
    if not 0 <= size <= MAX_PREAD:
        raise too_large(f"descriptor {fd}", MAX_PREAD)
    if not 0 <= offset < 1 << 63:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.pread(fd, size, offset)


def list_bounded(path: str, limit: int = MAX_ENTRIES) -> list[str]:
    """Return the names in a directory, which has at most ``limit`` entries.

    :raises OSError: If the directory cannot be read. The errno is EFBIG if it has more entries.
    """
    with os.scandir(path) as entries:
        names = [entry.name for entry in itertools.islice(entries, limit + 1)]
    if len(names) > limit:
        raise too_large(path, limit, "entries")
    return names
