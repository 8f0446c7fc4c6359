# SPDX-License-Identifier: GPL-2.0-or-later
"""Open files in another process's root directory.

A path below ``/proc/PID/root`` leaves this root directory if a component is an absolute symbolic
link or, in a chroot, if the path contains ``..``. The process controls its own root directory, so
such a path could make this process open any file of the host. Therefore this module uses
openat2(2) with ``RESOLVE_IN_ROOT``. It opens files with ``O_PATH``, which has no effect on a device
or FIFO, so that the caller can check the type of the file before it uses the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ..errors import Code, UnsupportedError
from .proc_files import PROC
from .procfs import Process


@contextlib.contextmanager
def open_inside(process: Process, path: str | bytes) -> Iterator[int]:
    """Open a path in a process's root directory within the block.

    :param path: The path in the process's root directory. The working directory of this process has
        no influence on a relative path.
    :returns: A descriptor that was opened with ``O_PATH``. The file behind it is opened with
        :func:`reopened`.
    :raises OSError: If the path cannot be opened.
    :raises GoneError: If the process has exited.
    :raises UnsupportedError: If the kernel has no openat2(2).
    """
    from .._native import lib  # noqa: PLC0415

    root = os.open(f"{process.proc}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        process.check()  # the directory belongs to this process, even if the pid is reused later
        found = int(lib.open_in_root(root, os.fsencode(path)))
    finally:
        os.close(root)
    if found == -errno.ENOSYS:
        raise UnsupportedError(
            f"the kernel has no openat2(2), so {os.fsdecode(path)} cannot be opened in the root "
            f"directory of process {process.pid}",
            "use Linux 5.6 or newer, and allow openat2(2) in the seccomp filter of the container "
            "or service that runs qemu-prefault",
            code=Code.PROC,
        )
    if found < 0:
        raise OSError(-found, os.strerror(-found), os.fsdecode(path))
    try:
        yield found
    finally:
        os.close(found)


@contextlib.contextmanager
def open_in_mount(directory: int, name: str) -> Iterator[int]:
    """Open an entry of a directory within the block, with ``O_PATH``.

    The function does not follow a link, and does not open a mount point. A system call on a file of
    another mount can block permanently, for example if the server of a FUSE file system hangs.

    :raises OSError: If the entry cannot be opened. The errno is EXDEV if it is a mount point.
    """
    from .._native import lib  # noqa: PLC0415

    found = int(lib.open_in_mount(directory, os.fsencode(name)))
    if found < 0:
        raise OSError(-found, os.strerror(-found), name)
    try:
        yield found
    finally:
        os.close(found)


def reopened(fd: int) -> str:
    """Return a path to the file of a descriptor that was opened with ``O_PATH``."""
    return f"{PROC}/self/fd/{fd}"
