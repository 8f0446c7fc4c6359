# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin's prefault vCPUs do not make the guest's clock slower.

If KVM stops using the master clock, ``clock_gettime()`` in the guest becomes a system call.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median

import pytest

from qemu_prefault_lab.guest import Guest, GuestConfig
from support.guest import SNAPSHOT, add_disk, check_memory, run_job, wait_migrated

ROUNDS = 5
CONFIG = GuestConfig(
    machine="q35", smp=2, memory_mib=160, cpu="qemu64",
    args=["-action", "reboot=reset", "-smp", "2,maxcpus=3"],
)  # fmt: skip


def after(event: str, stack: ExitStack, directory: Path, plugin: list[str] | None) -> Guest:
    """Return a running guest in which an event has occurred."""

    def start(**options: object) -> Guest:
        return stack.enter_context(Guest(CONFIG, plugin=plugin, **options))

    directory.mkdir()
    guest = start(workload_mib=16)
    guest.wait_ready()
    if event == "reset":
        guest.reset()
        guest.wait_ready()
    elif event == "loadvm":
        add_disk(guest, directory / "disk")
        run_job(guest, "snapshot-save", **SNAPSHOT)
        run_job(guest, "snapshot-load", **SNAPSHOT)
        guest.qmp("cont")
    elif event == "restore":
        guest.save(directory / "state")
        guest = start(incoming=directory / "state")
        guest.wait_restored()
        guest.qmp("cont")
    elif event == "migration":
        uri = f"unix:{directory / 'migration'}"
        target = start(incoming=uri)
        guest.qmp("migrate", uri=uri)
        wait_migrated(guest)
        target.wait_event("RESUME")
        guest = target
    elif event == "hotplug":
        cpu = next(c for c in guest.qmp("query-hotpluggable-cpus") if "qom-path" not in c)
        guest.qmp("device_add", driver=cpu["type"], id="cpu", **cpu["props"])
    return guest


@pytest.mark.full
@pytest.mark.parametrize("event", ["boot", "reset", "loadvm", "restore", "migration", "hotplug"])
def test_clock_is_as_fast_as_without_the_plugin(tmp_path: Path, event: str) -> None:
    with ExitStack() as stack:
        prefaulted = after(event, stack, tmp_path / "plugin", ["vcpu=prefault"])
        assert prefaulted.wait_kept()["prefault_vcpus"]
        guests = [prefaulted, after(event, stack, tmp_path / "plain", None)]
        rounds = [
            [float(guest.command("clock")["seconds"]) for guest in guests] for _ in range(ROUNDS)
        ]
        ratio = median(with_plugin / without for with_plugin, without in rounds)
        print(f"{event}: {ratio:.3f} times the time without the plugin: {rounds}")
        assert ratio <= 1.5
        check_memory(prefaulted)
