# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin does not stall a running guest when memory is plugged.

Each test compares a guest with a control guest that has the same limits, but no plugin. Each guest
measures the intervals in which its vCPU does not run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault_lab.wait import wait_for
from support.limits import cgroups, in_group
from support.native import build_capable_plugin
from support.plugin import ask_status
from support.qemu import StartQemu, kvm_usable, start_vm
from support.stalls import MeasuringGuest, make_disk, tsc_frequency

DIMM = 512 << 20
#: The maximum time in seconds by which the guest's longest stall may exceed the control's. A plugin
#: that populates DIMM at once stalls the guest for more than 0.5 s.
STALL = 0.25
LOGGED = 0.01

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm is not usable"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not installed"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]


@dataclass(frozen=True)
class Limited:
    """A guest that gets its limit while it runs.

    :ivar prefix: The arguments to prepend to QEMU's command.
    :ivar apply: Limit the guest, given QEMU's PID.
    """

    prefix: list[str]
    apply: Callable[[int], None]


def set_fifo(pid: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(task.name), os.SCHED_FIFO, os.sched_param(1))


def set_quota(group: Path, unified: bool) -> None:
    """Allow a fifth of a CPU, in periods of one second."""
    if unified:
        (group / "cpu.max").write_text("200000 1000000")
    else:
        (group / "cpu.cfs_period_us").write_text("1000000")
        (group / "cpu.cfs_quota_us").write_text("200000")


@contextmanager
def limited(limit: str) -> Iterator[Limited]:
    if limit == "fifo":
        yield Limited([], set_fifo)
        return
    with cgroups("cpu") as ((group,), unified):
        yield Limited(in_group(group), lambda _pid: set_quota(group, unified))


def plug(guest: MeasuringGuest) -> None:
    execute = guest.vm.qmp.execute
    backend: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": "m", "size": DIMM}
    execute("object-add", **backend)
    execute("device_add", driver="pc-dimm", id="d", memdev="m")


def policies(pid: int, name: str) -> set[int]:
    """Return the scheduling policies of the threads with a name."""
    threads = [path for path in Path(f"/proc/{pid}/task").iterdir()]
    return {
        os.sched_getscheduler(int(path.name))
        for path in threads
        if (path / "comm").read_text().strip() == name
    }


@pytest.fixture(scope="module")
def capable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_capable_plugin(tmp_path_factory.mktemp("plugin") / "qemu-prefault-plugin.so")


@pytest.mark.parametrize("limit", ["fifo", "quota"])
def test_new_memory_does_not_stall_the_guest(
    start_qemu: StartQemu, tmp_path: Path, capable: Path, limit: str
) -> None:
    frequency = tsc_frequency()
    image = make_disk(tmp_path, frequency, LOGGED, 0)
    control = tmp_path / "control"
    plugin = ["-plugin", f"{capable},socket={control}"]
    cpus = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        guests = []
        for options, cpu in ((plugin, cpus[-1]), ([], cpus[0])):
            how = stack.enter_context(limited(limit))
            vm = start_vm(
                start_qemu,
                tmp_path,
                *("-m", "64M,slots=2,maxmem=1G"),
                *("-drive", f"file={image},format=raw,if=ide,snapshot=on"),
                *options,
                accel="kvm",
                paused=False,
                prefix=[*how.prefix, "taskset", "-c", str(cpu)],
            )
            stack.callback(vm.qemu.kill)
            guest = MeasuringGuest(vm, frequency)
            guest.wait_running()
            guests.append((guest, how))
        wait_for(lambda: not ask_status(control)["pending"], "the guest is prefaulted")
        for guest, how in guests:
            how.apply(guest.vm.pid)
        before = [len(guest.stalls()) for guest, _ in guests]
        populated = ask_status(control)["counters"]["populated"]
        for guest, _ in guests:
            plug(guest)

        def is_done() -> bool:
            status = ask_status(control)
            return bool(
                not status["pending"] and status["counters"]["populated"] >= populated + DIMM
            )

        wait_for(is_done, "the new memory is prefaulted", 60)
        stalls = [
            max(guest.stalls(first), default=0)
            for (guest, _), first in zip(guests, before, strict=True)
        ]
        assert stalls[0] <= stalls[1] + STALL
        if limit == "quota":
            assert ask_status(control)["slowed_by"] == "CPU quota"
        else:
            assert policies(guests[0][0].vm.pid, "prefault-vcpu") == {os.SCHED_OTHER}
