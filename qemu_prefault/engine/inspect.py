# SPDX-License-Identifier: GPL-2.0-or-later
"""Look without touching: where the guest's RAM is, and what KVM counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..host.kvm import Stage2Leaves
from ..host.pagemap import Pagemap
from ..qemu.memory_map import huge_alignment
from ..qemu.monitor import Monitor
from ..qemu.queries import read_stage2, read_vcpu_stats
from ..units import HUGE_PAGE_SIZE
from .report import SCHEMA, stage2_json
from .vm import Vm

VCPU_COUNTERS = ("pf_taken", "pf_fixed", "pf_spurious", "exits")


@dataclass(frozen=True, slots=True)
class MappedSection:
    """A piece of guest memory; sizes in bytes.

    ``resident``: present in QEMU's page tables. ``writable``: of that, what a prefault would
    map writable. ``huge``: whether guest and host addresses allow 2 MiB leaves.
    """

    #: QEMU's name of the memory region.
    name: str
    #: The guest-physical address of the section.
    gpa: int
    #: The size of the section, in bytes.
    size: int
    #: The virtual address of the section in QEMU; 0 if it is not mapped.
    hva: int
    #: What backs the section in QEMU, for example ``anonymous``.
    backing: str
    #: The page size of the backing, in bytes.
    page_size: int
    #: The kind of memory device (``dimm``, ``virtio-mem``, …); null for boot memory.
    device: str | None
    #: The guest's NUMA node.
    node: int | None
    #: Whether guest and host addresses permit leaves of 2 MiB.
    huge: bool
    #: Bytes that are present in QEMU's page tables; null if this is unknown.
    resident: int | None
    #: Bytes of these that a prefault would map writable; null if this is unknown.
    writable: int | None
    #: Why a run would leave the section out.
    skipped: str | None


@dataclass(frozen=True, slots=True)
class RamMap:
    #: The process id of QEMU.
    pid: int
    #: The version of QEMU.
    version: str
    #: The run state of the guest, as QMP names it.
    status: str
    #: The sections of guest memory, in the order of their addresses.
    sections: tuple[MappedSection, ...]
    #: KVM's stage-2 counters; null if there are no counters.
    stage2: Stage2Leaves | None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "qemu": {"pid": self.pid, "version": self.version, "status": self.status},
            "sections": [asdict(section) for section in self.sections],
            "stage2": stage2_json(self.stage2),
        }


async def ram_map(vm: Vm) -> RamMap:
    """The RAM of a QEMU, sections that are left out included."""
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
    """KVM's counters at one moment; the vCPU ones summed over all vCPUs, since the VM began."""

    #: KVM's stage-2 counters; null if there are no counters.
    stage2: Stage2Leaves | None
    #: Sums over all vCPUs since the VM was created, by the names in ``VCPU_COUNTERS``.
    vcpus: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "stage2": stage2_json(self.stage2), "vcpus": self.vcpus}


async def counters(monitor: Monitor) -> Counters:
    """Ask for them (QMP ``query-stats``)."""
    per_vcpu = await read_vcpu_stats(monitor, VCPU_COUNTERS)
    sums: dict[str, int] = {}
    for stats in per_vcpu.values():
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return Counters(await read_stage2(monitor), sums)
