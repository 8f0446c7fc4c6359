# SPDX-License-Identifier: GPL-2.0-or-later
"""Look without touching: where the guest's RAM is, and what KVM counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .layout import huge_alignment
from .monitor import Monitor, read_stage2, read_vcpu_stats
from .pagemap import Pagemap
from .plan import HUGE
from .report import SCHEMA, Stage2, size, stage2_json, table
from .session import Session

VCPU_COUNTERS = ("pf_taken", "pf_fixed", "pf_spurious", "exits")


@dataclass(frozen=True, slots=True)
class MappedSection:
    """A piece of guest memory; sizes in bytes.

    ``resident``: present in QEMU's page tables. ``writable``: of that, what a prefault would
    map writable. ``huge``: whether guest and host addresses allow 2 MiB leaves.
    """

    name: str
    gpa: int
    size: int
    hva: int
    backing: str
    page_size: int
    device: str | None
    node: int | None
    huge: bool
    resident: int | None
    writable: int | None
    skipped: str | None


@dataclass(frozen=True, slots=True)
class RamMap:
    pid: int
    version: str
    status: str
    sections: tuple[MappedSection, ...]
    stage2: Stage2 | None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "qemu": {"pid": self.pid, "version": self.version, "status": self.status},
            "sections": [asdict(section) for section in self.sections],
            "stage2": stage2_json(self.stage2),
        }

    def lines(self) -> Iterator[str]:
        rows = [
            [
                section.name,
                f"{section.gpa:#x}",
                size(section.size),
                f"{section.hva:#x}" if section.hva else "-",
                section.backing,
                "" if section.node is None else str(section.node),
                "-" if section.resident is None else size(section.resident),
                "-" if section.writable is None else size(section.writable),
                "2M" if section.huge else "4K",
                section.skipped or "",
            ]
            for section in self.sections
        ]
        headers = ["section", "gpa", "size", "hva", "backing", "node", "resident", "writable"]
        yield from table([*headers, "leaf", "skipped"], rows)
        if self.stage2 is not None:
            yield f"mapped in stage 2: {size(self.stage2.bytes)} ({self.stage2})"


async def ram_map(qmp: str, pid: int | None = None) -> RamMap:
    """The RAM of the QEMU behind a QMP socket, sections that are left out included."""
    async with Session.open(qmp, pid) as session:
        machine = session.machine
        found = []
        with Pagemap(session.process) as pagemap:
            for section in machine.sections:
                backing, sums = "-", None
                if section.hva:
                    kind = session.backing(section)
                    backing = str(kind)
                    sums = pagemap.sums(section.hva, section.size, kind.private)
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
                        huge=section.size >= HUGE and huge_alignment(section, HUGE),
                        resident=sums.present if sums else None,
                        writable=sums.writable if sums else None,
                        skipped=section.skipped,
                    )
                )
        return RamMap(
            session.process.pid,
            machine.version,
            machine.status,
            tuple(found),
            await read_stage2(session.monitor),
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """KVM's counters at one moment; the vCPU ones summed over all vCPUs, since the VM began."""

    stage2: Stage2 | None
    vcpus: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "stage2": stage2_json(self.stage2), "vcpus": self.vcpus}

    def lines(self) -> Iterator[str]:
        stage2 = self.stage2
        leaves = (stage2.pages_4k, stage2.pages_2m, stage2.pages_1g) if stage2 else ("-",) * 3
        values = [*leaves, *(self.vcpus.get(name, "-") for name in VCPU_COUNTERS)]
        yield "".join(f"{value:>12}" for value in values)


def counters_header() -> str:
    names = ("pages_4k", "pages_2m", "pages_1g", *VCPU_COUNTERS)
    return "".join(f"{name:>12}" for name in names)


async def counters(monitor: Monitor) -> Counters:
    """Ask for them (QMP ``query-stats``)."""
    per_vcpu = await read_vcpu_stats(monitor, VCPU_COUNTERS)
    sums: dict[str, int] = {}
    for stats in per_vcpu.values():
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return Counters(await read_stage2(monitor), sums)
