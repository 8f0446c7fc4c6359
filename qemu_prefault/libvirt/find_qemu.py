# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU that libvirt has started for a domain, found without asking libvirt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import Code, FailedError, GoneError
from ..host.procfs import Process


def pid_files(name: str) -> Iterator[Path]:
    """Where libvirt writes a domain's pid: the system's daemon, and a user's."""
    yield Path(f"/run/libvirt/qemu/{name}.pid")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(f"{runtime}/libvirt/qemu/run/{name}.pid")


def find_qemu(name: str, uuid: str) -> Process:
    """The process, once its command line has told that it is this domain's.

    :raise FailedError: there is none, or it is another's (code ``no-qemu``).
    """
    problem = "there is no pid file"
    for path in pid_files(name):
        try:
            pid = int(path.read_text().strip())
        except (FileNotFoundError, ValueError):
            continue
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            continue
        try:
            process = Process.find(pid)
            arguments = process.arguments()
        except GoneError:
            problem = f"process {pid} of {path} is gone"
            continue
        if not uuid or uuid in arguments:
            return process
        problem = f"process {pid} of {path} is not that of {uuid}"
    raise FailedError(
        f"the QEMU of domain {name} was not found: {problem}",
        "is it running on this host? virsh domstate DOMAIN",
        code=Code.NO_QEMU,
    )
