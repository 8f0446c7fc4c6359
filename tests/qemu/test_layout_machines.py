# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the layouts of real machines agree with the kernel's mappings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.engine.preflight import check_vm_state
from qemu_prefault.errors import RefusedError
from qemu_prefault.host.fds import kvm_fds
from qemu_prefault.host.headroom import hugetlb_pool_limit
from qemu_prefault.host.mappings import backing_of, mappings_of
from qemu_prefault.host.procfs import Process
from qemu_prefault.qemu.memory_map import MemorySection, firmware_ahead, huge_alignment
from qemu_prefault.qemu.monitor import Monitor
from qemu_prefault.qemu.queries import VmState, read_vm_state

StartQemu = Callable[..., Any]  # conftest.py
MIB, GIB = 1 << 20, 1 << 30

LOW = (0, 0xC0000)  # up to the VGA window and option ROMs


def read(qemu: Any) -> VmState:
    async def main() -> VmState:
        async with Monitor.connect(qemu.qmp) as monitor:
            return await read_vm_state(monitor)

    return asyncio.run(main())


def ram(machine: VmState) -> list[MemorySection]:
    return [section for section in machine.sections if section.skipped is None]


def backings(qemu: Any, machine: VmState) -> dict[str | None, str]:
    """Check that all RAM is mapped, and return each backend's kind of mapping."""
    maps = Process.find(qemu.pid).maps()
    found: dict[str | None, str] = {}
    for section in ram(machine):
        covering = mappings_of(maps, section.hva, section.size)
        (kind,) = {backing_of(mapping, section.page_size) for mapping in covering}
        (shared,) = {mapping.shared for mapping in covering}
        assert shared == section.share
        found[section.memdev] = kind
    return found


@pytest.mark.parametrize("machine_type", ["pc", "q35"])
def test_small_machine(start_qemu: StartQemu, accel: str, machine_type: str) -> None:
    qemu = start_qemu("-M", machine_type, "-m", "256M", accel=accel)
    machine = read(qemu)
    assert [(s.gpa, s.size) for s in ram(machine)] == [LOW, (MIB, 255 * MIB)]
    assert {s.skip_code for s in machine.sections if s.skipped} == {"rom"}
    assert backings(qemu, machine) == {"pc.ram": "anonymous"}
    assert all(huge_alignment(section, 2 * MIB) for section in ram(machine))
    assert (machine.status, machine.running) == ("prelaunch", False)
    assert machine.kvm == (accel == "kvm")
    assert machine.machine_type is not None and machine_type[:2] in machine.machine_type
    assert machine.migration is None and machine.balloon is None
    assert firmware_ahead(machine.ranges) is True
    (vcpu,) = machine.vcpus
    assert vcpu.thread_id in Process.find(qemu.pid).threads()


def test_microvm(start_qemu: StartQemu, accel: str) -> None:
    machine = read(start_qemu("-M", "microvm", "-m", "256M", accel=accel))
    assert {s.name for s in ram(machine)} == {"microvm.ram"}
    assert ram(machine)[-1].end == 256 * MIB
    assert {s.skip_code for s in machine.sections if s.skipped} == {"device-memory"}
    assert firmware_ahead(machine.ranges) is False


@pytest.mark.parametrize(("machine_type", "low"), [("pc", 3), ("q35", 2), ("microvm", 3)])
def test_above_4g(start_qemu: StartQemu, machine_type: str, low: int) -> None:
    """Check the layout of RAM above 4 GiB.

    The guest is paused, so the host needs much less than 5 GiB of memory.
    """
    machine = read(start_qemu("-M", machine_type, "-m", "5G"))
    *_, below, above = ram(machine)
    assert (below.gpa, below.end) == (MIB, low * GIB)
    assert (above.gpa, above.size, above.offset) == (4 * GIB, (5 - low) * GIB, low * GIB)
    assert above.hva - below.hva == low * GIB - MIB


def test_backends(start_qemu: StartQemu, tmp_path: Path) -> None:
    backends = {
        "memfd": ("memory-backend-memfd", "memfd", False),
        "file": (f"memory-backend-file,mem-path={tmp_path}/ram,share=on", "file", False),
        "private": (f"memory-backend-file,mem-path={tmp_path}/ram2", "file", False),
        "aligned": (f"memory-backend-file,mem-path={tmp_path}/ram3,align=2M", "file", True),
        "shm": ("memory-backend-file,mem-path=/dev/shm,share=on", "shmem", False),
        "shared": ("memory-backend-ram,share=on", "shmem", True),
    }
    for name, (options, backing, huge) in backends.items():
        qemu = start_qemu(
            "-m", "64M", "-object", f"{options},id={name},size=64M", "-M", f"memory-backend={name}"
        )
        machine = read(qemu)
        assert backings(qemu, machine) == {name: backing}
        assert {huge_alignment(section, 2 * MIB) for section in ram(machine)} == {huge}
        qemu.kill()


def test_hugetlb(start_qemu: StartQemu) -> None:
    if hugetlb_pool_limit(2 * MIB, ours=1 << 62).available < 64 * MIB:
        pytest.skip("no free huge pages")
    backend = "memory-backend-memfd,id=m0,size=64M,hugetlb=on,hugetlbsize=2M"
    qemu = start_qemu("-m", "64M", "-object", backend, "-M", "memory-backend=m0")
    machine = read(qemu)
    assert {section.page_size for section in ram(machine)} == {2 * MIB}
    assert backings(qemu, machine) == {"m0": "hugetlb"}


def test_old_machine_types_name_backends_by_path(start_qemu: StartQemu, tmp_path: Path) -> None:
    backend = f"memory-backend-file,id=m0,size=64M,mem-path={tmp_path}/ram"
    arguments = ["-M", "pc-i440fx-3.1", "-m", "64M", "-object", backend]
    try:
        qemu = start_qemu(*arguments, "-M", "memory-backend=m0")
    except AssertionError as error:
        if "unsupported machine type" in str(error):
            pytest.skip("this QEMU does not support pc-i440fx-3.1")
        raise
    sections = ram(read(qemu))
    assert {section.name for section in sections} == {"/objects/m0"}
    assert {section.memdev for section in sections} == {"m0"}


def test_numa(start_qemu: StartQemu, accel: str) -> None:
    qemu = start_qemu(
        "-M", "q35", "-smp", "2", "-m", "3G,slots=2,maxmem=8G",
        "-object", "memory-backend-ram,id=big,size=2560M",
        "-object", "memory-backend-memfd,id=small,size=512M",
        "-object", "memory-backend-ram,id=plugged,size=128M",
        "-numa", "node,nodeid=0,memdev=small,cpus=1", "-numa", "node,nodeid=1,memdev=big,cpus=0",
        "-numa", "node,nodeid=2", "-device", "pc-dimm,memdev=plugged,node=2",
        accel=accel,
    )  # fmt: skip
    machine = read(qemu)
    assert [(s.memdev, s.node) for s in ram(machine)] == [
        ("small", 0), ("small", 0), ("big", 1), ("big", 1), ("plugged", 2)
    ]  # fmt: skip
    assert [(vcpu.index, vcpu.node) for vcpu in machine.vcpus] == [(0, 1), (1, 0)]
    assert backings(qemu, machine) == {"small": "memfd", "big": "anonymous", "plugged": "anonymous"}


DEVICES = {
    "dimm": ("memory-backend-ram", "pc-dimm", "pc"),
    "nvdimm": ("memory-backend-file,share=on,mem-path={}/pmem", "nvdimm,label-size=128K",
               "pc,nvdimm=on"),
    "virtio-mem": ("memory-backend-memfd,reserve=off",
                   "virtio-mem-pci,requested-size=32M,id=vmem", "q35"),
    "virtio-pmem": ("memory-backend-file,share=on,mem-path={}/pmem", "virtio-pmem-pci", "q35"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEVICES)
def test_memory_devices(start_qemu: StartQemu, accel: str, tmp_path: Path, kind: str) -> None:
    backend, device, machine_type = DEVICES[kind]
    qemu = start_qemu(
        "-M", machine_type, "-m", "256M,slots=2,maxmem=4G",
        "-object", f"{backend.format(tmp_path)},id=extra,size=128M",
        "-device", f"{device},memdev=extra", accel=accel,
    )  # fmt: skip
    machine = read(qemu)
    section = ram(machine)[-1]
    assert (section.device, section.memdev, section.gpa) == (kind, "extra", 4 * GIB)
    assert section.size == 128 * MIB - (128 << 10 if kind == "nvdimm" else 0)
    assert section.reserve is (kind != "virtio-mem")
    (found,) = machine.memory_devices
    assert found.gpa == section.gpa
    if kind == "virtio-mem":  # the device has a memslot although nothing is plugged
        assert (found.plugged, found.requested, found.size) == (0, 32 * MIB, 128 * MIB)
    assert len(backings(qemu, machine)) == 2


def test_vga_memory_and_balloon(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "256M", "-vga", "std", "-device", "virtio-balloon-pci")
    machine = read(qemu)
    assert machine.balloon is not None
    assert machine.balloon.actual == machine.balloon.total == 256 * MIB


def test_hotplugged_dimm_appears(start_qemu: StartQemu, accel: str) -> None:
    qemu = start_qemu("-m", "128M,slots=1,maxmem=1G", accel=accel)

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            before = await read_vm_state(monitor)
            backend = {"qom-type": "memory-backend-ram", "id": "hot", "size": 128 * MIB}
            await monitor.execute_raw("object-add", backend)
            await monitor.execute("device_add", driver="pc-dimm", id="dimm", memdev="hot")
            after = await read_vm_state(monitor)
            new = set(after.sections) - set(before.sections)
            assert {(s.memdev, s.device, s.skipped) for s in new} == {("hot", "dimm", None)}

    asyncio.run(main())


def test_seabios_finishes(start_qemu: StartQemu) -> None:
    """Check that firmware_ahead() is false after SeaBIOS's last memslot change."""
    qemu = start_qemu("-M", "q35", "-m", "128M", "-vga", "std", accel="kvm", paused=False)

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            for _ in range(600):
                machine = await read_vm_state(monitor)
                if firmware_ahead(machine.ranges) is False:
                    break
                await asyncio.sleep(0.05)  # poll, because QEMU sends no event
            else:
                pytest.fail("SeaBIOS did not finish within 30 s")
            codes = {section.skip_code for section in machine.sections}
            assert codes >= {None, "rom", "read-only", "device-memory"}
            (vram,) = [s for s in machine.sections if s.name == "vga.vram"]
            assert vram.skip_code == "device-memory" and vram.hva
            assert machine.status == "running"

    asyncio.run(main())


def test_read_only_main_ram_is_named(start_qemu: StartQemu, tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.write_bytes(b"")
    os.truncate(file, 64 * MIB)
    backend = f"memory-backend-file,id=m,size=64M,mem-path={file},share=off,readonly=on"
    qemu = start_qemu("-m", "64M", "-object", backend, "-machine", "pc,memory-backend=m")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            sections = (await read_vm_state(monitor)).sections
            ram = {s.skip_code for s in sections if s.memdev == "m" and s.gpa >= MIB}
            assert ram == {"read-only-backend"}

    asyncio.run(main())


def test_migration_status(start_qemu: StartQemu, tmp_path: Path) -> None:
    qemu = start_qemu("-m", "64M")

    async def main() -> None:
        async with Monitor.connect(qemu.qmp) as monitor:
            events_on = {"capability": "events", "state": True}
            await monitor.execute("migrate-set-capabilities", capabilities=[events_on])
            with monitor.events("MIGRATION") as events:
                await monitor.execute("migrate", uri=f"exec:cat > {tmp_path}/state")
                async for event in events:
                    if event.data.get("status") == "completed":
                        break
            machine = await read_vm_state(monitor)
            # QEMU sends the completion event before it changes the run state
            # (migration_iteration_finish() in migration/migration.c).
            assert machine.migration == "completed"
            assert machine.status in ("finish-migrate", "postmigrate")
            with pytest.raises(RefusedError) as refusal:
                check_vm_state(machine)
            assert refusal.value.code == "migration"
        incoming = start_qemu("-m", "64M", "-incoming", "defer")
        async with Monitor.connect(incoming.qmp) as monitor:
            assert (await read_vm_state(monitor)).status == "inmigrate"

    asyncio.run(main())


def test_halted_vcpu_waits_in_a_futex(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M", accel="kvm")
    (vcpu,) = read(qemu).vcpus
    process = Process.find(qemu.pid)
    syscall = process.thread_syscall(vcpu.thread_id)
    assert syscall is not None and syscall.startswith("202 ")  # futex: qemu_wait_io_event()
    assert process.exe is not None and "qemu-system" in process.exe
    # QEMU's vCPU threads block most signals, but not SIGUSR1, with which QEMU kicks them
    # (kvm_init_cpu_signals() in accel/kvm/kvm-all.c).
    assert not process.status(vcpu.thread_id).sig_blocked >> 9 & 1


def test_two_hundred_vcpus_are_read_fast(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-M", "q35", "-m", "64M", "-smp", "200", accel="kvm")
    machine = read(qemu)
    assert [vcpu.index for vcpu in machine.vcpus] == list(range(200))
    fds = kvm_fds(Process.find(qemu.pid))
    assert len(fds.vcpus) == 200 and fds.vm is not None and fds.kvm is not None
    for number in fds.vcpus.values():
        assert "kvm-vcpu:" in os.readlink(f"/proc/{qemu.pid}/fd/{number}")
