# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run did, in one frozen object, and its JSON.

The JSON is a contract (``schema`` 1): names are only ever added. Times are seconds, sizes
bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ExitStatus
from ..host.kvm import Stage2Leaves

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SectionReport:
    """One section of guest RAM; ``skipped`` says why nothing, or not all, was done to it."""

    name: str
    gpa: int
    size: int
    hva: int
    backing: str
    populated: int
    prefaulted: int
    skipped: str | None


@dataclass(frozen=True, slots=True)
class ByteSums:
    """Sums over all sections. ``populated``: newly allocated in QEMU's own page tables."""

    requested: int
    populated: int
    prefaulted: int
    remaining: int


def stage2_json(stage2: Stage2Leaves | None) -> dict[str, int] | None:
    """``{"4k": …, "2m": …, "1g": …}``, or None where there are no counters."""
    if stage2 is None:
        return None
    return {"4k": stage2.pages_4k, "2m": stage2.pages_2m, "1g": stage2.pages_1g}


@dataclass(frozen=True, slots=True)
class Seconds:
    """``populate`` and ``prefault`` by the helpers' own clocks; ``paused`` by our doing.

    ``paused`` is what all pauses come to, ``longest_pause`` the longest one. Of an incoming
    guest it is the time from its RAM being found loaded until it was resumed.
    """

    populate: float
    prefault: float
    paused: float
    longest_pause: float
    total: float


@dataclass(frozen=True, slots=True)
class RunWarning:
    """Something worth knowing that stopped nothing; ``code`` is stable."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    agent: str
    pid: int
    qemu_version: str
    qemu_status: str
    kernel_release: str
    pre_fault_memory: bool | None
    sections: tuple[SectionReport, ...]
    bytes: ByteSums
    before: Stage2Leaves | None
    after: Stage2Leaves | None
    seconds: Seconds
    warnings: tuple[RunWarning, ...] = field(default=())
    dry_run: bool = False

    @property
    def exit_status(self) -> ExitStatus:
        """VERIFIED only if every requested byte is accounted for."""
        if self.dry_run or self.bytes.remaining == 0:
            return ExitStatus.VERIFIED
        return ExitStatus.PARTIAL

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "agent": self.agent,
            "qemu": {"pid": self.pid, "version": self.qemu_version, "status": self.qemu_status},
            "kernel": {
                "release": self.kernel_release,
                "pre_fault_memory": self.pre_fault_memory,
            },
            "sections": [asdict(section) for section in self.sections],
            "bytes": asdict(self.bytes),
            "stage2": {"before": stage2_json(self.before), "after": stage2_json(self.after)},
            "seconds": {name: round(value, 6) for name, value in asdict(self.seconds).items()},
            "warnings": [asdict(warning) for warning in self.warnings],
            "dry_run": self.dry_run,
            "exit": int(self.exit_status),
        }
