# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the map of a guest's RAM, and KVM's counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..host.kvm import Stage2Leaves
from ..host.pagemap import Pagemap
from ..qemu.kvm_stats import read_stage2, read_vcpu_stats
from ..qemu.memory_map import huge_alignment
from ..qemu.monitor import Monitor
from ..units import HUGE_PAGE_SIZE
from .report import SCHEMA, stage2_json
from .vm import Vm

#: The vCPU counters that :func:`counters` adds up over all vCPUs.
VCPU_COUNTERS = ("pf_taken", "pf_fixed", "pf_spurious", "exits")


@dataclass(frozen=True, slots=True)
class MappedSection:
    """A section of guest memory, with sizes and addresses in bytes.

    :ivar huge: Whether the guest and host addresses allow KVM to map 2 MiB leaves.
    :ivar resident: Bytes that are present in QEMU's page tables, or None if unknown.
    :ivar writable: Resident bytes that a prefault would map writable, or None if unknown.
    :ivar skipped: The reason why a run skips the section, or None.
    """

    #: QEMU's name for the memory region.
    name: str
    #: The guest-physical address of the section.
    gpa: int
    #: The size of the section.
    size: int
    #: The virtual address of the section in QEMU, or 0 if it is not mapped.
    hva: int
    #: The kind of memory that backs the section in QEMU, for example ``anonymous``.
    backing: str
    #: The page size of the backing.
    page_size: int
    #: The kind of memory device (``dimm``, ``virtio-mem``, …), or None for boot memory.
    device: str | None
    #: The guest's NUMA node, or None.
    node: int | None
    huge: bool
    resident: int | None
    writable: int | None
    skipped: str | None


@dataclass(frozen=True, slots=True)
class RamMap:
    """The map of a guest's RAM.

    :ivar stage2: The current leaves in the stage-2 tables, or None if unknown.
    """

    #: QEMU's process id.
    pid: int
    #: QEMU's version.
    version: str
    #: The run state of the guest (``query-status``).
    status: str
    sections: tuple[MappedSection, ...]
    stage2: Stage2Leaves | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``qemu-prefault map --json``."""
        return {
            "schema": SCHEMA,
            "qemu": {"pid": self.pid, "version": self.version, "status": self.status},
            "sections": [asdict(section) for section in self.sections],
            "stage2": stage2_json(self.stage2),
        }


async def ram_map(vm: Vm) -> RamMap:
    """Return the map of a guest's RAM, including the skipped sections.

    :raises UnsupportedError: If this process has no permission to trace QEMU.
    """
    state = vm.state
    found = []
    with Pagemap(vm.process) as pagemap:
        for section in state.sections:
            backing, sums = "-", None
            if section.hva:
                kind = vm.backing(section)
                backing = str(kind)
                sums = pagemap.sums(section.hva, section.size, kind.private)
            huge = section.size >= HUGE_PAGE_SIZE and huge_alignment(section, HUGE_PAGE_SIZE)
            found.append(
                MappedSection(
                    name=section.name,
                    gpa=section.gpa,
                    size=section.size,
                    hva=section.hva,
                    backing=backing,
                    page_size=section.page_size,
                    device=section.device,
                    node=section.node,
                    huge=huge,
                    resident=sums.present if sums else None,
                    writable=sums.writable if sums else None,
                    skipped=section.skipped,
                )
            )
    return RamMap(
        vm.process.pid,
        state.version,
        state.status,
        tuple(found),
        await read_stage2(vm.monitor),
    )


@dataclass(frozen=True, slots=True)
class Counters:
    """The values of KVM's counters.

    :ivar stage2: The current leaves in the stage-2 tables, or None if unknown.
    :ivar vcpus: The sum over all vCPUs for each counter in :data:`VCPU_COUNTERS`. The counters
        count from the start of the VM.
    """

    stage2: Stage2Leaves | None
    vcpus: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``qemu-prefault stats --json``."""
        return {"schema": SCHEMA, "stage2": stage2_json(self.stage2), "vcpus": self.vcpus}


async def counters(monitor: Monitor) -> Counters:
    """Read KVM's counters over QMP (``query-stats``)."""
    per_vcpu = await read_vcpu_stats(monitor, VCPU_COUNTERS)
    sums: dict[str, int] = {}
    for stats in per_vcpu.values():
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return Counters(await read_stage2(monitor), sums)
