# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the tool on guests with the real ioctl, and inspect the guests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, Unpack

from qemu_prefault_lab.guest import Guest

from .process import resident_bytes
from .tool import Result, Tool

#: MiB of guest memory in addition to the workload, for the kernel and for untouched memory.
OTHER_MIB = 96
#: Arguments for snapshot-save and snapshot-load, for the disk that :func:`add_disk` adds.
SNAPSHOT = {"tag": "s", "vmstate": "disk", "devices": ["disk"]}


class GuestOptions(TypedDict, total=False):
    """The keyword arguments of :class:`Guest`, for functions that forward them."""

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
    """A function that starts a guest, which the fixture kills after the test."""

    def __call__(self, **options: Unpack[GuestOptions]) -> Guest: ...


class MakePluginGuest(Protocol):
    """A function that starts a guest, and passes options to the plugin."""

    def __call__(self, *plugin_options: str, **options: Unpack[GuestOptions]) -> Guest: ...


@contextlib.contextmanager
def plugin_guests(workload_mib: int, *first: str) -> Iterator[MakePluginGuest]:
    """Return a function that starts guests, which are killed at the end of the block.

    :param workload_mib: The default size of a guest's workload in MiB.
    :param first: Plugin options for each guest.
    """
    with contextlib.ExitStack() as stack:

        def start(*plugin_options: str, **options: Unpack[GuestOptions]) -> Guest:
            options.setdefault("workload_mib", workload_mib)
            options["plugin"] = (*first, *plugin_options)
            return stack.enter_context(Guest(**options))

        yield start


#: A function that takes the number of vCPUs, the workload's size in MiB, and whether the guest has
#: KVM, and returns the path of a saved guest.
MakeSavedState = Callable[[int, int, bool], Path]
SetThp = Callable[[str], str]


def start_tool(guest: Guest, *arguments: str) -> Tool:
    return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments])


def prefault(guest: Guest, *arguments: str) -> Result:
    """Run ``qemu-prefault --qmp … --json`` on a guest."""
    return start_tool(guest, *arguments).finish()


def start_incoming_tool(guest: Guest, *options: str) -> Tool:
    """Start the tool with ``--incoming`` and wait until the tool is ready."""
    tool = start_tool(guest, "--incoming", *options)
    tool.wait_ready()
    return tool


def wait_migrated(source: Guest) -> None:
    """Wait until an outgoing migration has completed."""
    while (status := source.wait_event("MIGRATION")["data"]["status"]) != "completed":
        assert status not in ("failed", "cancelled"), status


def faults(guest: Guest) -> int:
    """Return the number of stage-2 faults since QEMU started."""
    return guest.stats()["pf_taken"]


def check_memory(guest: Guest) -> None:
    """Check that the guest responds and that its memory is unchanged."""
    assert guest.command("pass")["bad"] == 0


def faults_of_pass(guest: Guest) -> int:
    """Let a guest write its workload and return the number of stage-2 faults."""
    before = faults(guest)
    check_memory(guest)
    return faults(guest) - before


class Follower:
    """A context manager that runs ``qemu-prefault --follow --json``.

    Entering the context waits for the tool's first event.

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
        """Wait for the next event and return it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the tool exited with {self.process.wait()}"
        event: dict[str, Any] = json.loads(line)
        return event

    def prefaulted(self) -> dict[str, Any]:
        """Wait for the next ``prefaulted`` event, and skip other events."""
        while (event := self.event())["event"] != "prefaulted":
            pass
        return event


def mapped_bytes(guest: Guest) -> int:
    """Return the number of bytes that the guest's stage-2 tables map."""
    stats = guest.stats()
    return (stats["pages_4k"] << 12) + (stats["pages_2m"] << 21) + (stats["pages_1g"] << 30)


def plug_dimm(guest: Guest, size: int, name: str = "d0") -> None:
    """Plug a DIMM named ``dimm-NAME`` into a running guest.

    A stopped guest would not accept the DIMM.
    """
    guest.qmp("object-add", qom_type="memory-backend-ram", id=name, size=size)
    guest.qmp("device_add", driver="pc-dimm", id=f"dimm-{name}", memdev=name)


def run_job(guest: Guest, command: str, **arguments: Any) -> None:
    guest.qmp(command, job_id="job", **arguments)
    while (job := guest.qmp("query-jobs")[0])["status"] != "concluded":
        guest.wait_event("JOB_STATUS_CHANGE")
    assert "error" not in job, job
    guest.qmp("job-dismiss", id="job")


def add_disk(guest: Guest, path: Path) -> None:
    """Add a qcow2 disk that can hold snapshots."""
    run_job(guest, "blockdev-create", options={"driver": "file", "filename": str(path), "size": 0})
    guest.qmp("blockdev-add", driver="file", node_name="file", filename=str(path))
    run_job(guest, "blockdev-create", options={"driver": "qcow2", "file": "file", "size": 1 << 20})
    guest.qmp("blockdev-add", driver="qcow2", node_name="disk", file="file")


def ram_hva(guest: Guest) -> int:
    """Return the host virtual address of guest physical address 0."""
    return int(guest.hmp("gpa2hva 0").split()[-1], 16)


def ram_resident(guest: Guest) -> int:
    """Return the resident bytes of the guest's RAM, without QEMU's own memory."""
    return resident_bytes(guest.pid, ram_hva(guest))


def ram_checksum(guest: Guest, backend: str = "ram") -> int:
    """Return the CRC of the guest's RAM, read through /proc/PID/mem."""
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
