# SPDX-License-Identifier: GPL-2.0-or-later
"""Count the requested and the completed bytes of a run, and build its report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from ..errors import Code
from ..host.kvm import Stage2Leaves, describe_errno
from ..qemu.memory_map import MemorySection
from ..units import format_size
from .report import ByteSums, Report, RunWarning, Seconds, SectionReport
from .vm import Vm


@dataclass(slots=True)
class SectionTally:
    """The numbers of requested and completed bytes of one section.

    :ivar requested: Bytes that the run should prefault. If the run only populates, these are the
        bytes that it should populate.
    :ivar populated: Bytes that were newly allocated.
    :ivar prefaulted: Bytes that the ioctl has mapped.
    :ivar accounted: Bytes of ``requested`` that the run has completed.
    :ivar skipped: Bytes of pages that cannot be populated.
    :ivar note: The reason why the section is incomplete, or None.
    """

    requested: int = 0
    populated: int = 0
    prefaulted: int = 0
    accounted: int = 0
    skipped: int = 0
    note: str | None = None

    def count_skipped(self, size: int, error: int) -> None:
        """Count a page that cannot be populated because of ``error``."""
        self.skipped += size
        self.note = f"populate: {format_size(self.skipped)} skipped: {describe_errno(error)}"


class RunTally:
    """The tallies, times, counters and warnings of one run.

    :ivar tallies: A map from a section's guest-physical address, in hexadecimal, to its tally.
    :ivar warnings: A map from codes to warnings for the operator.
    :ivar before: Leaves in the stage-2 tables before the run, or None if unknown.
    :ivar after: Leaves in the stage-2 tables after the run, or None if unknown.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, SectionTally] = {}
        self.warnings: dict[str, str] = {}
        self.before: Stage2Leaves | None = None
        self.after: Stage2Leaves | None = None
        self._started = time.monotonic()
        self._seconds = {"populate": 0.0, "prefault": 0.0}
        self._paused_seconds = 0.0
        self._longest_pause = 0.0

    def of(self, section: MemorySection) -> SectionTally:
        """Return the tally of a section, and create the tally if necessary."""
        return self.tallies.setdefault(f"{section.gpa:#x}", SectionTally())

    def count_work(self, phase: str, seconds: float) -> None:
        """Add ``seconds`` to the duration of the ``populate`` or ``prefault`` phase."""
        self._seconds[phase] += seconds

    def count_pause(self, began: float) -> None:
        """Count a pause that ends now.

        :param began: ``time.monotonic()`` when the pause began.
        """
        seconds = time.monotonic() - began
        self._paused_seconds += seconds
        self._longest_pause = max(self._longest_pause, seconds)

    def discard_requests(self) -> None:
        """Reset the requested and prefaulted bytes before a repeated request."""
        for tally in self.tallies.values():
            tally.requested = tally.prefaulted = tally.accounted = 0

    def discard_prefaults(self) -> None:
        """Reset the prefaulted bytes before all targets are prefaulted again."""
        for tally in self.tallies.values():
            tally.prefaulted = tally.accounted = 0

    def discard_accounted(self) -> None:
        """Reset the completed bytes, because KVM filled tables that are not in use."""
        for tally in self.tallies.values():
            tally.accounted = 0

    def verify(self) -> None:
        """Compare the tallies with KVM's counters, and subtract dropped bytes."""
        if self.after is None:
            self.warnings[Code.NO_COUNTERS] = (
                "this QEMU or kernel does not provide KVM's counters (query-stats), so the result "
                "is not verified"
            )
            return
        missing = sum(tally.prefaulted for tally in self.tallies.values()) - self.after.bytes
        if missing <= 0:
            return
        self.warnings[Code.ZAPPED] = (
            f"KVM dropped {format_size(missing)} from the stage-2 tables during the run, because "
            "QEMU deleted a memory slot (firmware, reset, hot-unplug) or the host reclaimed memory"
        )
        for tally in self.tallies.values():
            lost = min(missing, tally.prefaulted)
            tally.prefaulted -= lost
            tally.accounted -= lost
            missing -= lost

    def report(self, vm: Vm, agent: str, dry_run: bool = False) -> Report:
        """Return the report of the run."""
        tallies = self.tallies.values()
        requested = sum(tally.requested for tally in tallies)
        return Report(
            agent=agent,
            pid=vm.process.pid,
            qemu_version=vm.state.version,
            qemu_status=vm.state.status,
            kernel_release=os.uname().release,
            pre_fault_memory=vm.capability.available,
            sections=tuple(
                self._of_section(vm, section)
                for section in vm.state.sections
                if section.hva and section.skip_code not in ("rom", "rom-device")
            ),
            bytes=ByteSums(
                requested,
                sum(tally.populated for tally in tallies),
                sum(tally.prefaulted for tally in tallies),
                max(0, requested - sum(tally.accounted for tally in tallies)),
            ),
            before=self.before,
            after=self.after,
            seconds=Seconds(
                self._seconds["populate"],
                self._seconds["prefault"],
                self._paused_seconds,
                self._longest_pause,
                time.monotonic() - self._started,
            ),
            warnings=tuple(RunWarning(code, text) for code, text in self.warnings.items()),
            dry_run=dry_run,
        )

    def _of_section(self, vm: Vm, section: MemorySection) -> SectionReport:
        tally = self.tallies.get(f"{section.gpa:#x}", SectionTally())
        return SectionReport(
            section.name,
            section.gpa,
            section.size,
            section.hva,
            str(vm.backing(section)),
            tally.populated,
            tally.prefaulted,
            section.skipped or tally.note,
        )
