# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the tool does not stall a running guest under any scheduling policy.

Each test compares a guest with a control guest that has the same scheduling. Only the guest is
populated. Each guest measures the intervals in which its vCPU does not run.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.process import leftovers
from support.qemu import StartQemu, kvm_usable, start_tool, start_vm
from support.scheduling import scheduling
from support.stalls import MeasuringGuest, make_disk, tsc_frequency

MIB = 1 << 20
#: The maximum time in seconds by which the guest's longest stall may exceed the control's.
STALL = 0.1
#: Intervals of at least this length in seconds are logged.
LOGGED = 0.01
#: The time in milliseconds that the vCPU spins in each period of 3 ms, before the vCPU halts.
SPIN = {"busy": 3, "half": 1, "idle": 0}

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm is not usable"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not installed"),
]


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
    start_qemu: StartQemu, tmp_path: Path, policy: str, load: str
) -> None:
    frequency = tsc_frequency()
    image = make_disk(tmp_path, frequency, LOGGED, SPIN[load])
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
