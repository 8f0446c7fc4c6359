# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that measures how long its vCPU does not run."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from .qemu import QemuVm

SOURCE = Path(__file__).parent.parent / "qemu/stall_guest.S"
LOG, ENTRIES = 0x8000, 0x8010


class MeasuringGuest:
    """A guest that measures the intervals in which its vCPU does not run."""

    def __init__(self, vm: QemuVm, frequency: float) -> None:
        self.vm = vm
        self.vcpu = vm.vcpu
        self._frequency = frequency

    def read(self, address: int, count: int) -> list[int]:
        """Return ``count`` 64-bit values from the guest's physical memory."""
        command = f"xp /{count}gx {address:#x}"
        text = str(self.vm.qmp.execute("human-monitor-command", command_line=command))
        return [int(word, 16) for line in text.splitlines() for word in line.split()[1:]]

    def stalls(self, first: int = 0) -> list[float]:
        """Return the logged intervals in seconds, starting at index ``first``."""
        count = self.read(LOG, 1)[0] & 0xFFFFFFFF
        values = self.read(ENTRIES + 8 * first, count - first) if count > first else []
        return [value / self._frequency for value in values]

    def wait_running(self) -> None:
        """Wait until the guest updates its log."""
        deadline = time.monotonic() + 30
        before = self.read(LOG + 8, 1)
        while before == [0] or self.read(LOG + 8, 1) == before:
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.05)
            before = before if before != [0] else self.read(LOG + 8, 1)


def make_disk(directory: Path, frequency: float, logged: float, spin: int) -> Path:
    """Create a disk image from which a :class:`MeasuringGuest` boots.

    :param frequency: The frequency of the TSC in Hz.
    :param logged: Intervals of at least this length in seconds are logged.
    :param spin: The time in milliseconds that the vCPU spins in each period of 3 ms.
    """
    sector, image = directory / "sector", directory / "disk"
    flags = ["-m16", "-nostdlib", "-static", "-Wl,--build-id=none,-Ttext=0x7c00,--oformat=binary"]
    subprocess.run(["cc", *flags, SOURCE, "-o", sector], check=True)
    disk = bytearray(sector.read_bytes())
    disk[4] = spin
    disk[8:12] = int(logged * frequency).to_bytes(4, "little")
    image.write_bytes(disk)
    return image


def tsc_frequency() -> float:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    pytest.skip("/proc/cpuinfo does not show the CPU's frequency")
