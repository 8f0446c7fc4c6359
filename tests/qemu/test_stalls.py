# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the tool does not stall a running guest under any scheduling policy.

Each test compares a guest with a control guest that has the same scheduling. Only the guest is
populated. Each guest measures the intervals in which its vCPU does not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.process import leftovers
from support.qemu import QemuVm, StartQemu, kvm_usable, start_tool, start_vm
from support.scheduling import scheduling

SOURCE = Path(__file__).with_name("stall_guest.S")
MIB = 1 << 20
#: The maximum time in seconds by which the guest's longest stall may exceed the control's.
STALL = 0.1
#: Intervals of at least this length in seconds are logged.
LOGGED = 0.01
#: The time in milliseconds that the vCPU spins in each period of 3 ms, before the vCPU halts.
SPIN = {"busy": 3, "half": 1, "idle": 0}
LOG, ENTRIES = 0x8000, 0x8010

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm is not usable"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not installed"),
]


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


@pytest.fixture
def boot_sector(tmp_path: Path) -> Path:
    path = tmp_path / "sector"
    flags = ["-m16", "-nostdlib", "-static", "-Wl,--build-id=none,-Ttext=0x7c00,--oformat=binary"]
    subprocess.run(["cc", *flags, SOURCE, "-o", path], check=True)
    return path


def tsc_frequency() -> float:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    pytest.skip("/proc/cpuinfo does not show the CPU's frequency")


FULL = [(policy, "busy") for policy in ("other", "quota", "pinned")]
FULL += [("fifo", "half"), ("rr", "half")]
FULL += [(policy, "idle") for policy in ("other", "pinned", "rr")]


@pytest.mark.parametrize(
    ("policy", "load"),
    [
        ("quota", "idle"),
        ("fifo", "idle"),
        ("rr", "busy"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in FULL),
    ],
)
def test_running_guest_does_not_stall(
    start_qemu: StartQemu, tmp_path: Path, boot_sector: Path, policy: str, load: str
) -> None:
    frequency = tsc_frequency()
    disk = bytearray(boot_sector.read_bytes())
    disk[4] = SPIN[load]
    disk[8:12] = int(LOGGED * frequency).to_bytes(4, "little")
    image = tmp_path / "disk"
    image.write_bytes(disk)
    drive = ("-drive", f"file={image},format=raw,if=ide,snapshot=on")
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("needs two CPUs")
    busy_rr = (policy, load) == ("rr", "busy")
    with ExitStack() as stack:
        vcpus = stack.enter_context(scheduling(policy))
        guests = []
        for name, cpu in (("guest", max(every)), ("control", min(every))):
            vm = start_vm(
                start_qemu,
                tmp_path,
                "-m",
                "512M",
                *drive,
                accel="kvm",
                paused=False,
                prefix=vcpus.prefix,
            )
            stack.callback(vm.qemu.kill)
            guest = MeasuringGuest(vm, frequency)
            guest.wait_running()
            vcpus.apply(guest.vcpu, name)
            if policy not in ("other", "quota"):
                # Busy vCPUs with real-time priority share a CPU, because other threads need one.
                os.sched_setaffinity(guest.vcpu, {max(every) if busy_rr else cpu})
            guests.append(guest)
        before = [len(guest.stalls()) for guest in guests]
        result = start_tool(guests[0].vm.qemu, "--populate-only").finish()
        stalls = [max(guest.stalls(n), default=0) for guest, n in zip(guests, before, strict=True)]
        assert result.status == 0, result.stderr
        assert result.report["bytes"]["populated"] > 500 * MIB
        assert stalls[0] <= stalls[1] + STALL
        assert leftovers(guests[0].vm.pid) == []
