# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests where the real ioctl is, and the tool beside them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from qemu_prefault_lab.guest import Guest

from .process import resident_bytes
from .tool import Result, Tool

OTHER_MIB = 96
"""What a guest has beside its workload's memory: its kernel, and memory it never touches."""
SNAPSHOT = {"tag": "s", "vmstate": "disk", "devices": ["disk"]}
"""Arguments of snapshot-save and snapshot-load, with the disk of :func:`add_disk`."""


def start_tool(guest: Guest, *arguments: str) -> Tool:
    return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments])


def prefault(guest: Guest, *arguments: str) -> Result:
    """Run ``qemu-prefault --qmp … --json`` on a guest."""
    return start_tool(guest, *arguments).finish()


def faults(guest: Guest) -> int:
    return guest.stats()["pf_taken"]


def run_job(guest: Guest, command: str, **arguments: Any) -> None:
    guest.qmp(command, job_id="job", **arguments)
    while (job := guest.qmp("query-jobs")[0])["status"] != "concluded":
        guest.wait_event("JOB_STATUS_CHANGE")
    assert "error" not in job, job
    guest.qmp("job-dismiss", id="job")


def add_disk(guest: Guest, path: Path) -> None:
    """A qcow2 image, to keep snapshots in."""
    run_job(guest, "blockdev-create", options={"driver": "file", "filename": str(path), "size": 0})
    guest.qmp("blockdev-add", driver="file", node_name="file", filename=str(path))
    run_job(guest, "blockdev-create", options={"driver": "qcow2", "file": "file", "size": 1 << 20})
    guest.qmp("blockdev-add", driver="qcow2", node_name="disk", file="file")


def ram_hva(guest: Guest) -> int:
    """Where QEMU has the guest's first byte."""
    return int(guest.hmp("gpa2hva 0").split()[-1], 16)


def ram_resident(guest: Guest) -> int:
    """Bytes of the guest's RAM that are there; QEMU's own memory comes and goes."""
    return resident_bytes(guest.pid, ram_hva(guest))


def ram_checksum(guest: Guest, backend: str = "ram") -> int:
    """CRC of the guest's RAM, read from QEMU's memory behind its back."""
    size = next(m["size"] for m in guest.qmp("query-memdev") if m["id"] == backend)
    hva = ram_hva(guest)
    value = 0
    fd = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    try:
        for at in range(0, size, 8 << 20):
            value = zlib.crc32(os.pread(fd, min(8 << 20, size - at), hva + at), value)
    finally:
        os.close(fd)
    return value
