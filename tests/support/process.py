# SPDX-License-Identifier: GPL-2.0-or-later
"""Inspect QEMU's processes: their memory, the helpers that the tool left, and their threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from qemu_prefault.agents.gadgets import AREAS_FROM, AREAS_TO
from qemu_prefault.agents.qemu_process import helper_threads
from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for


def leftovers(pid: int) -> list[str]:
    """Return descriptions of the helper threads and helper mappings in a process."""
    found = [f"thread {tid}" for tid in helper_threads(pid)]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if AREAS_FROM <= int(line.split("-")[0], 16) < AREAS_TO:
            found.append(line)
    return found


def other_threads(pid: int, vcpu: int) -> list[int]:
    """Return the threads of a QEMU that are neither its vCPU nor its main thread."""
    return [tid for tid in Process.find(pid).threads() if tid not in (pid, vcpu)]


def wait_clean(pid: int) -> float:
    """Wait until a process has no helpers and return the elapsed seconds."""
    return wait_for(lambda: not leftovers(pid), f"all helpers in process {pid} have exited")


@contextlib.contextmanager
def suspended_thread(tid: int) -> Iterator[None]:
    """Suspend one thread of another process during the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    seize, interrupt, detach, any_child = 0x4206, 0x4207, 17, 0x40000000  # __WALL
    for request in (seize, interrupt):
        if libc.ptrace(request, tid, None, None):
            raise OSError(ctypes.get_errno(), f"ptrace({request:#x})")
    os.waitpid(tid, any_child)
    try:
        yield
    finally:
        libc.ptrace(detach, tid, None, None)


def resident_bytes(pid: int, address: int) -> int:
    """Return the resident bytes (Rss) of the mapping that contains the address."""
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping contains {address:#x}")


def anonymous_bytes(pid: int) -> int:
    """Return the private resident memory (RssAnon) of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


def tracers(pid: int) -> set[str]:
    """Return the ids of the processes that trace a thread of the process ``pid``."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has exited
            for line in (task / "status").read_text().splitlines():
                if line.startswith("TracerPid:"):
                    found.add(line.split()[1])
    return found - {"0"}


def open_files(pid: int) -> set[str]:
    """Return the paths of the files that a process has open."""
    paths = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the file was closed meanwhile
            paths.add(os.readlink(link))
    return paths
