# SPDX-License-Identifier: GPL-2.0-or-later
"""The report of a run, which can be converted to JSON.

The JSON format is stable (``schema`` 1). Later versions may add fields, but never rename or remove
them. Sizes are in bytes, and times are in seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ExitStatus
from ..host.kvm import Stage2Leaves

#: The format version in the ``schema`` field of every JSON object.
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SectionReport:
    """The result for one section of guest RAM.

    :ivar populated: Bytes that were newly allocated in QEMU's own page tables.
    :ivar prefaulted: Bytes that were mapped in the stage-2 tables.
    :ivar skipped: The reason why the section was skipped or is incomplete, or None.
    """

    #: QEMU's name for the memory region.
    name: str
    #: The guest-physical address of the section.
    gpa: int
    #: The size of the section.
    size: int
    #: The virtual address of the section in QEMU.
    hva: int
    #: The kind of memory that backs the section in QEMU, for example ``anonymous``.
    backing: str
    populated: int
    prefaulted: int
    skipped: str | None


@dataclass(frozen=True, slots=True)
class ByteSums:
    """Numbers of bytes, each of which is a sum over all sections.

    :ivar requested: Bytes that the run should prefault. With ``--populate-only``, these are the
        bytes that the run should populate.
    :ivar populated: Bytes that were newly allocated in QEMU's own page tables.
    :ivar prefaulted: Bytes that were mapped in the stage-2 tables.
    :ivar remaining: Requested bytes that the run did not complete or could not verify.
    """

    requested: int
    populated: int
    prefaulted: int
    remaining: int


def stage2_json(stage2: Stage2Leaves | None) -> dict[str, int] | None:
    """Return ``{"4k": …, "2m": …, "1g": …}``, or None if ``stage2`` is None."""
    if stage2 is None:
        return None
    return {"4k": stage2.pages_4k, "2m": stage2.pages_2m, "1g": stage2.pages_1g}


@dataclass(frozen=True, slots=True)
class Seconds:
    """The durations of a run's phases, in seconds.

    :ivar populate: The time spent on populating, as measured by the workers.
    :ivar prefault: The time spent on prefaulting, as measured by the workers.
    :ivar paused: The total time during which this run paused the guest. For an incoming guest, this
        is the time between the end of loading and the resume.
    :ivar longest_pause: The length of the longest pause.
    :ivar total: The duration of the whole run.
    """

    populate: float
    prefault: float
    paused: float
    longest_pause: float
    total: float


@dataclass(frozen=True, slots=True)
class RunWarning:
    """A problem that did not end the run."""

    #: A member of :class:`~qemu_prefault.errors.Code`.
    code: str
    #: The warning as a sentence.
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    :ivar agent: The name of the agent, which is ``attach``, ``plugin`` or ``qmp``.
    :ivar pid: QEMU's process id.
    :ivar qemu_version: QEMU's version, for example ``10.0.13``.
    :ivar qemu_status: The guest's run state at the last ``query-status``.
    :ivar kernel_release: The release of the running kernel (``uname -r``).
    :ivar pre_fault_memory: Whether KVM supports KVM_PRE_FAULT_MEMORY, or None if unknown.
    :ivar before: Leaves in the stage-2 tables before the run, or None if unknown.
    :ivar after: Leaves in the stage-2 tables after the run, or None if unknown.
    :ivar dry_run: Whether the report describes what a run would do, instead of what a run did.
    """

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
        """``PARTIAL`` if requested bytes remain after a run, otherwise ``VERIFIED``."""
        if self.dry_run or self.bytes.remaining == 0:
            return ExitStatus.VERIFIED
        return ExitStatus.PARTIAL

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``--json`` prints."""
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
