# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the QEMU process of a libvirt domain, without calling libvirt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..errors import Code, FailedError, GoneError
from ..host.procfs import Process, parse_number

PID_MAX: Final = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h


def pid_files(name: str) -> Iterator[Path]:
    """Yield the paths at which libvirt daemons store the pid file of a domain."""
    yield Path(f"/run/libvirt/qemu/{name}.pid")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(f"{runtime}/libvirt/qemu/run/{name}.pid")


def find_qemu(name: str, uuid: str) -> Process:
    """Return the QEMU process of a domain.

    :param name: The domain's name.
    :param uuid: The domain's UUID, which QEMU's command line must contain. If the UUID is empty,
        the function does not check the command line.
    :raises FailedError: If no process of this domain was found (code ``no-qemu``).
    """
    problem = "libvirt wrote no pid file"
    for path in pid_files(name):
        try:
            pid = parse_number(path.read_text(errors="replace"))
        except (FileNotFoundError, ValueError):  # ValueError: the name contains a null character
            continue
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            continue
        if pid is None or not 0 < pid <= PID_MAX:
            problem = f"{path} contains no process id"
            continue
        try:
            process = Process.find(pid)
            arguments = process.arguments()
        except GoneError:
            problem = f"process {pid} from {path} has exited"
            continue
        if not uuid or uuid in arguments:
            return process
        problem = f"process {pid} from {path} does not belong to domain {uuid}"
    raise FailedError(
        f"the QEMU of domain {name} was not found: {problem}",
        "check that the domain is running on this host: virsh domstate DOMAIN",
        code=Code.NO_QEMU,
    )
