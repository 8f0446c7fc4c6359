# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate guests with prefault vCPUs, and plug their vCPUs, again and again.

``--boots`` sets the number of guests in each test. The default is 6, and ``make test-full`` uses
100. ``--seed`` repeats the random choices of an earlier run of the test.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest, GuestConfig
from qemu_prefault_lab.wait import wait_for
from support.guest import check_memory, prefault, ram_hva, wait_migrated

pytestmark = [pytest.mark.campaign, pytest.mark.full]

MIB = 1 << 20
PAGE = 4096
MEMORY_MIB, WORKLOAD_MIB = 192, 32
#: Bytes per second, so low that the first pass does not end while the guest is busy.
BANDWIDTHS = (MIB // 4, MIB)
#: Without these options, KVM itself writes to some of the guest's pages, also after a migration.
NO_KVM_PAGES = "no-kvmclock no-steal-acc"
#: Maximum number of vCPUs of a random topology.
MOST_VCPUS = 8


def ram_blocks(guest: Guest) -> Iterator[tuple[str, int, int]]:
    """Return the name, the size in bytes and the host virtual address of each RAM block."""
    row = re.compile(r"^ *(\S+) +\d+ \S+ +0x\S+ +0x\S+ +(0x\S+) +(0x\S+)", re.M)
    for name, total, hva in row.findall(guest.hmp("info ramblock")):
        yield name, int(total, 16), int(hva, 16)


def different_pages(one: Guest, other: Guest) -> list[tuple[str, int]]:
    """Return the name and the offset of each page of a RAM block that differs in two QEMUs."""
    found = []
    blocks, others = (list(ram_blocks(guest)) for guest in (one, other))
    assert [block[:2] for block in blocks] == [block[:2] for block in others]
    assert ram_hva(one) in {hva for _, _, hva in blocks}
    memories = [os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY) for guest in (one, other)]
    try:
        for (name, size, hva), (_, _, other_hva) in zip(blocks, others, strict=True):
            for at in range(0, size, MIB):
                length = min(MIB, size - at)
                a, b = (
                    os.pread(memory, length, start + at)
                    for memory, start in zip(memories, (hva, other_hva), strict=True)
                )
                assert len(a) == len(b) == length
                if a != b:
                    found += [
                        (name, at + page)
                        for page in range(0, length, PAGE)
                        if a[page : page + PAGE] != b[page : page + PAGE]
                    ]
    finally:
        for memory in memories:
            os.close(memory)
    return found


def migration_status(guest: Guest) -> str | None:
    status: str | None = guest.qmp("query-migrate").get("status")
    return status


def migrate(rng: random.Random, directory: Path, accel: str) -> str:
    """Migrate a guest that writes its memory, while the plugin is told to prefault.

    :returns: A description of the migration.
    """
    uri = f"unix:{directory / 'migration'}"
    config = GuestConfig(
        memory_mib=MEMORY_MIB, accel=accel, smp=rng.choice([1, 2]), kernel_args=NO_KVM_PAGES
    )
    bandwidth = rng.choice(BANDWIDTHS)
    commands = [rng.choice(["prefault", "resume", "tool", "write"]) for _ in range(4)]
    with (
        Guest(config, workload_mib=WORKLOAD_MIB, plugin=["vcpu=prefault", "keep=off"]) as source,
        Guest(config, plugin=["vcpu=prefault"], incoming=uri, paused=True) as target,
    ):
        source.wait_ready()
        source.command("run")
        source.qmp("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=10)
        source.qmp("migrate", uri=uri)
        wait_for(lambda: migration_status(source) == "active", "the first pass")
        for command in commands:
            if command == "tool":
                prefault(source)
            elif command == "write":
                source.command("stop")
                source.command(f"alloc {WORKLOAD_MIB + 16}")
                source.command("run")
            else:
                source.control(command)
        assert migration_status(source) == "active"
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
        wait_migrated(source)
        wait_for(lambda: source.status() == "postmigrate", "the source has ended")
        assert different_pages(source, target) == []
        target.qmp("cont")
        assert target.command("stop")["bad"] == 0
        check_memory(target)
        status = target.wait_kept()
        assert status["counters"]["errors"] == 0
    return f"{config.smp} vCPU, {bandwidth >> 10} KiB/s: {' '.join(commands)}"


@pytest.mark.parametrize("accel", ["kvm", "kvm,dirty-ring-size=4096"], ids=["bitmap", "ring"])
def test_migrated_memory_is_equal(
    request: pytest.FixtureRequest, tmp_path: Path, seed: int, accel: str
) -> None:
    rng = random.Random(seed)
    for number in range(request.config.getoption("boots")):
        print(f"{number}: {migrate(rng, tmp_path, accel)}", flush=True)


def random_topology(rng: random.Random) -> str:
    """Return an argument of -smp with free slots. Some topologies leave APIC ids unused."""
    while True:
        sockets, cores, threads = rng.randint(1, 4), rng.randint(1, 4), rng.choice([1, 1, 2])
        most = sockets * cores * threads
        if 2 <= most <= MOST_VCPUS:
            cpus = rng.randint(1, most - 1)
            return f"{cpus},sockets={sockets},cores={cores},threads={threads},maxcpus={most}"


def plug_and_unplug_all(rng: random.Random, topology: str) -> str:
    """Plug all free vCPUs, and unplug them.

    :returns: A description of the guest.
    """
    machine = rng.choice(["pc", "q35"])
    with Guest(
        machine=machine,
        cpu="host",
        memory_mib=MEMORY_MIB,
        workload_mib=WORKLOAD_MIB,
        plugin=["vcpu=prefault"],
        args=["-smp", topology],
    ) as guest:
        guest.wait_ready()
        status = guest.wait_kept()
        ids = {vcpu["id"] for vcpu in status["prefault_vcpus"]}
        assert ids and not {vcpu["id"] for vcpu in status["vcpus"]} & ids
        free = [cpu for cpu in guest.qmp("query-hotpluggable-cpus") if "qom-path" not in cpu]
        rng.shuffle(free)
        for number, cpu in enumerate(free):
            guest.qmp("device_add", driver=cpu["type"], id=f"cpu{number}", **cpu["props"])
        plugged = {vcpu["id"] for vcpu in guest.control("status")["vcpus"]}
        assert len(plugged) == len(guest.qmp("query-cpus-fast"))
        assert not plugged & ids
        check_memory(guest)
        for number in range(len(free)):
            guest.qmp("device_del", id=f"cpu{number}")
            guest.wait_event("DEVICE_DELETED")
        guest.control("prefault")
        assert guest.wait_kept()["counters"]["errors"] == 0
        check_memory(guest)
        return f"{machine}, {topology}: {len(free)} plugged, prefault vCPUs {sorted(ids)}"


def test_random_topologies(request: pytest.FixtureRequest, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(request.config.getoption("boots")):
        topology = random_topology(rng)
        print(f"{number}: {topology}", flush=True)
        print(f"{number}: {plug_and_unplug_all(rng, topology)}", flush=True)
