# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run did, in one frozen object, and its two forms: JSON and a table.

The JSON is a contract (``schema`` 1): names are only ever added. Times are seconds, sizes
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from .errors import ExitStatus, QemuPrefaultError

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
class Bytes:
    """Sums over all sections. ``populated``: newly allocated in QEMU's own page tables."""

    requested: int
    populated: int
    prefaulted: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Stage2:
    """Leaf entries in the guest's stage-2 tables, by page size: counts, not bytes."""

    pages_4k: int
    pages_2m: int
    pages_1g: int

    @property
    def bytes(self) -> int:
        """Guest memory these leaves map."""
        return (self.pages_4k << 12) + (self.pages_2m << 21) + (self.pages_1g << 30)

    def __str__(self) -> str:
        return f"{self.pages_4k} x 4K + {self.pages_2m} x 2M + {self.pages_1g} x 1G"


def stage2_json(stage2: Stage2 | None) -> dict[str, int] | None:
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
class Caveat:
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
    bytes: Bytes
    before: Stage2 | None
    after: Stage2 | None
    seconds: Seconds
    warnings: tuple[Caveat, ...] = field(default=())
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


def error_json(error: QemuPrefaultError) -> dict[str, Any]:
    """The object that ``--json`` prints instead of a report."""
    return {
        "schema": SCHEMA,
        "error": {"code": error.code, "cause": error.cause, "remedy": error.remedy},
        "exit": int(error.exit_status),
    }


def size(number: int) -> str:
    """``402653184`` -> ``384.0 MiB``."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def table(headers: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Left-aligned text, right-aligned numbers; one line per row."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def is_number(text: str) -> bool:
        return text[:1].isdigit() or text in ("", "-")

    right = [bool(rows) and all(is_number(row[i]) for row in rows) for i in range(len(headers))]
    for row in [headers, *rows]:
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        yield "  ".join(cells).rstrip()


def lines(report: Report) -> Iterator[str]:
    """The table that the command line ends with."""
    rows = [
        [
            section.name,
            f"{section.gpa:#x}",
            size(section.size),
            section.backing,
            size(section.populated),
            size(section.prefaulted),
            section.skipped or "",
        ]
        for section in report.sections
    ]
    yield from table(["section", "gpa", "size", "backing", "populated", "prefaulted", "note"], rows)
    if report.before is not None and report.after is not None:
        yield (
            f"stage-2 leaves: {report.before} -> {report.after}"
            f"  ({size(report.before.bytes)} -> {size(report.after.bytes)})"
        )
    seconds = report.seconds
    yield (
        f"seconds: populate {seconds.populate:.3f}, prefault {seconds.prefault:.3f}, "
        f"guest paused {seconds.paused:.3f}"
        + (
            f" (at most {seconds.longest_pause:.3f} at one go)"
            if seconds.paused > seconds.longest_pause
            else ""
        )
        + f", total {seconds.total:.3f}"
    )
    for warning in report.warnings:
        yield f"warning ({warning.code}): {warning.text}"
    done = report.bytes
    if report.dry_run:
        yield f"dry run: {size(done.requested)} requested, {size(done.populated)} of it to populate"
    elif done.remaining:
        yield f"PARTIAL: {size(done.remaining)} of {size(done.requested)} are not accounted for"
    else:
        yield f"verified: all {size(done.requested)} requested"


def event_line(event: dict[str, Any]) -> str:
    """An event of ``--follow`` as a line: local time, what, why, and the figures."""
    stamp = datetime.fromtimestamp(float(event.get("time", 0))).strftime("%H:%M:%S")
    parts = [f"{stamp} {event.get('event', ''):<13}"]
    if "gpa" in event:
        parts.append(f"{event['gpa']:#x}+{size(int(event.get('size', 0)))}")
    for key in ("bytes", "populated", "pending", "remaining"):
        if event.get(key):
            parts.append(size(int(event[key])) if key == "bytes" else f"{key} {size(event[key])}")
    if "seconds" in event:
        parts.append(f"in {event['seconds']:.3f} s")
    if event.get("why"):
        parts.append(f"({event['why']})")
    return " ".join(parts)
