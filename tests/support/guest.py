# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests where the real ioctl is, and the tool beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, Unpack

from qemu_prefault_lab.guest import Guest

from .process import resident_bytes
from .tool import Result, Tool

OTHER_MIB = 96
"""What a guest has beside its workload's memory: its kernel, and memory it never touches."""
SNAPSHOT = {"tag": "s", "vmstate": "disk", "devices": ["disk"]}
"""Arguments of snapshot-save and snapshot-load, with the disk of :func:`add_disk`."""


class GuestOptions(TypedDict, total=False):
    """Keywords of :class:`Guest`, for helpers that pass them on."""

    machine: str
    accel: str
    memory_mib: int
    memory: str
    smp: int
    cpu: str | None
    backing: str | None
    paused: bool
    incoming: str | Path | None
    workload_mib: int
    kernel: str
    kernel_args: str
    args: Sequence[str]
    qemu: Sequence[str] | None
    kvm: bool
    ovmf: bool
    plugin: Sequence[str] | None
    preload: bool
    wrapper: Sequence[str]


class MakeGuest(Protocol):
    """A fixture that makes guests, and kills them when the test ends."""

    def __call__(self, **options: Unpack[GuestOptions]) -> Guest: ...


MakeSavedState = Callable[[int, int, bool], Path]
"""Called with the number of vCPUs, the MiB of the workload, and ``kvm``."""
SetThp = Callable[[str], str]


def start_tool(guest: Guest, *arguments: str) -> Tool:
    return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments])


def prefault(guest: Guest, *arguments: str) -> Result:
    """Run ``qemu-prefault --qmp … --json`` on a guest."""
    return start_tool(guest, *arguments).finish()


def start_incoming_tool(guest: Guest, *options: str) -> Tool:
    """Start the tool with ``--incoming``; return when it awaits the guest, and populates."""
    tool = start_tool(guest, "--incoming", *options)
    tool.wait_ready()
    return tool


def wait_migrated(source: Guest) -> None:
    """Wait until an outgoing migration is completed."""
    while (status := source.wait_event("MIGRATION")["data"]["status"]) != "completed":
        assert status not in ("failed", "cancelled"), status


def faults(guest: Guest) -> int:
    """Stage-2 faults since QEMU started."""
    return guest.stats()["pf_taken"]


def check_memory(guest: Guest) -> None:
    """The guest answers, and finds in its memory what it wrote there."""
    assert guest.command("pass")["bad"] == 0


def faults_of_pass(guest: Guest) -> int:
    """Stage-2 faults of a running guest while it writes all of its memory."""
    before = faults(guest)
    check_memory(guest)
    return faults(guest) - before


class Follower:
    """``qemu-prefault --follow --json``. A context manager; entering it waits for the first run.

    :param target: ``--qmp PATH`` or ``--domain NAME``.
    """

    def __init__(self, *target: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qemu_prefault", *target, "--follow", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.event()["why"] == "started"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def event(self) -> dict[str, Any]:
        """Wait for the next event."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it has ended with {self.process.wait()}"
        event: dict[str, Any] = json.loads(line)
        return event

    def prefaulted(self) -> dict[str, Any]:
        """Wait for the next run's event, and skip others."""
        while (event := self.event())["event"] != "prefaulted":
            pass
        return event


def mapped_bytes(guest: Guest) -> int:
    """Bytes in the stage-2 tables."""
    stats = guest.stats()
    return (stats["pages_4k"] << 12) + (stats["pages_2m"] << 21) + (stats["pages_1g"] << 30)


def plug_dimm(guest: Guest, size: int, name: str = "d0") -> None:
    """Plug the device ``dimm-NAME``, of a backend NAME; the guest takes it when it runs."""
    guest.qmp("object-add", qom_type="memory-backend-ram", id=name, size=size)
    guest.qmp("device_add", driver="pc-dimm", id=f"dimm-{name}", memdev=name)


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
