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

    #: QEMU's name of the memory region.
    name: str
    #: The guest-physical address of the section.
    gpa: int
    #: The size of the section, in bytes.
    size: int
    #: The virtual address of the section in QEMU.
    hva: int
    #: What backs the section in QEMU, for example ``anonymous``.
    backing: str
    #: Bytes that were newly allocated in QEMU's page tables.
    populated: int
    #: Bytes that ``KVM_PRE_FAULT_MEMORY`` accepted.
    prefaulted: int
    #: Why the section was left out, or done only in part; null if it is complete.
    skipped: str | None


@dataclass(frozen=True, slots=True)
class ByteSums:
    """Sums over all sections. ``populated``: newly allocated in QEMU's own page tables."""

    #: Bytes that the run was asked to prefault.
    requested: int
    #: Bytes that were newly allocated in QEMU's page tables.
    populated: int
    #: Bytes that ``KVM_PRE_FAULT_MEMORY`` accepted.
    prefaulted: int
    #: Bytes that are not accounted for; 0 if the run is verified.
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

    #: Time spent on populating, measured inside QEMU.
    populate: float
    #: Time spent on prefaulting, measured inside QEMU.
    prefault: float
    #: Total time for which the run kept the guest paused.
    paused: float
    #: The longest of these pauses.
    longest_pause: float
    #: Duration of the run.
    total: float


@dataclass(frozen=True, slots=True)
class RunWarning:
    """Something worth knowing that stopped nothing; ``code`` is stable."""

    #: A stable code: a member of :class:`~qemu_prefault.errors.Code`.
    code: str
    #: The warning as a sentence.
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    #: How the work was done inside QEMU: ``attach``, ``plugin`` or ``qmp``.
    agent: str
    #: The process id of QEMU.
    pid: int
    #: The version of QEMU.
    qemu_version: str
    #: The run state of the guest, as QMP names it.
    qemu_status: str
    #: The release of the host's kernel.
    kernel_release: str
    #: Whether KVM offers ``KVM_PRE_FAULT_MEMORY``; null if this is unknown.
    pre_fault_memory: bool | None
    #: The sections of guest RAM, in the order of their addresses.
    sections: tuple[SectionReport, ...]
    #: Sums over all sections.
    bytes: ByteSums
    #: KVM's stage-2 counters before the run; null if there are no counters.
    before: Stage2Leaves | None
    #: KVM's stage-2 counters after the run; null if there are no counters.
    after: Stage2Leaves | None
    #: How long the steps took.
    seconds: Seconds
    #: What limits the effect of the run.
    warnings: tuple[RunWarning, ...] = field(default=())
    #: Whether nothing was changed.
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
