# SPDX-License-Identifier: GPL-2.0-or-later
"""Format tables, reports and events as text."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import qemu_prefault

from ..units import format_size

if TYPE_CHECKING:
    from ..api import Counters, Findings, RamMap, Report
    from ..errors import QemuPrefaultError
    from ..libvirt.status import DomainStatus


def error_json(error: QemuPrefaultError) -> dict[str, Any]:
    """Return the object that ``--json`` prints if the command fails."""
    return {
        "schema": qemu_prefault.SCHEMA,
        "error": {"code": error.code, "cause": error.cause, "remedy": error.remedy},
        "exit": int(error.exit_status),
    }


def table(headers: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table with left-aligned text and right-aligned numbers."""
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


def report_lines(report: Report) -> Iterator[str]:
    """Format the report that the command line prints at the end of a run."""
    rows = [
        [
            section.name,
            f"{section.gpa:#x}",
            format_size(section.size),
            section.backing,
            format_size(section.populated),
            format_size(section.prefaulted),
            section.skipped or "",
        ]
        for section in report.sections
    ]
    yield from table(["section", "gpa", "size", "backing", "populated", "prefaulted", "note"], rows)
    if report.before is not None and report.after is not None:
        yield (
            f"stage-2 leaves: {report.before} -> {report.after}"
            f"  ({format_size(report.before.bytes)} -> {format_size(report.after.bytes)})"
        )
    seconds = report.seconds
    yield (
        f"seconds: populate {seconds.populate:.3f}, prefault {seconds.prefault:.3f}, "
        f"guest paused {seconds.paused:.3f}"
        + (
            f" (longest pause {seconds.longest_pause:.3f})"
            if seconds.paused > seconds.longest_pause
            else ""
        )
        + f", total {seconds.total:.3f}"
    )
    for warning in report.warnings:
        yield f"warning ({warning.code}): {warning.text}"
    done = report.bytes
    if report.dry_run:
        asked, absent = format_size(done.requested), format_size(done.populated)
        yield f"dry run: {asked} requested, {absent} of that would be populated"
    elif done.remaining:
        left, asked = format_size(done.remaining), format_size(done.requested)
        yield f"PARTIAL: {left} of {asked} are not accounted for"
    else:
        yield f"verified: all {format_size(done.requested)} requested"


def event_line(event: dict[str, Any]) -> str:
    """Format a ``--follow`` event as a line with time, name, sizes and reason."""
    stamp = datetime.fromtimestamp(float(event.get("time", 0))).strftime("%H:%M:%S")
    parts = [f"{stamp} {event.get('event', ''):<13}"]
    if "gpa" in event:
        parts.append(f"{event['gpa']:#x}+{format_size(int(event.get('size', 0)))}")
    for key in ("bytes", "populated", "pending", "remaining"):
        if event.get(key):
            parts.append(
                format_size(int(event[key]))
                if key == "bytes"
                else f"{key} {format_size(event[key])}"
            )
    if "seconds" in event:
        parts.append(f"in {event['seconds']:.3f} s")
    if event.get("why"):
        parts.append(f"({event['why']})")
    return " ".join(parts)


def ram_map_lines(found: RamMap) -> Iterator[str]:
    """Yield a line for each section of RAM, and one for the bytes in stage 2."""
    rows = [
        [
            section.name,
            f"{section.gpa:#x}",
            format_size(section.size),
            f"{section.hva:#x}" if section.hva else "-",
            section.backing,
            "" if section.node is None else str(section.node),
            "-" if section.resident is None else format_size(section.resident),
            "-" if section.writable is None else format_size(section.writable),
            "2M" if section.huge else "4K",
            section.skipped or "",
        ]
        for section in found.sections
    ]
    headers = ["section", "gpa", "size", "hva", "backing", "node", "resident", "writable"]
    yield from table([*headers, "leaf", "skipped"], rows)
    if found.stage2 is not None:
        yield f"mapped in stage 2: {format_size(found.stage2.bytes)} ({found.stage2})"


def counters_line(now: Counters) -> Iterator[str]:
    """Format the counters as one line, in the columns of :func:`counters_header`."""
    stage2 = now.stage2
    leaves = (stage2.pages_4k, stage2.pages_2m, stage2.pages_1g) if stage2 else ("-",) * 3
    values = [*leaves, *(now.vcpus.get(name, "-") for name in qemu_prefault.VCPU_COUNTERS)]
    yield "".join(f"{value:>12}" for value in values)


def counters_header() -> str:
    """Return the column headers of :func:`counters_line`."""
    names = ("pages_4k", "pages_2m", "pages_1g", *qemu_prefault.VCPU_COUNTERS)
    return "".join(f"{name:>12}" for name in names)


def findings_lines(findings: Findings) -> Iterator[str]:
    """Yield the lines that show each check and its remedy."""
    for finding in findings.findings:
        yield f"{finding.verdict:<5} {finding.check:<10} {finding.text}"
        for line in finding.remedy.splitlines():
            yield f"{'':17}-> {line}"


def status_lines(status: DomainStatus) -> Iterator[str]:
    """Format the state of the plugin in a domain."""
    if status.in_xml is None:
        yield f"{status.domain}: does not load the plugin"
        yield f"  -> qemu-prefault libvirt enable {status.domain}"
    else:
        yield f"{status.domain}: loads {status.in_xml.path} ({', '.join(status.in_xml.options)})"
        if not status.present:
            yield "  this file does not exist on this host, so the domain cannot start"
            yield "  -> qemu-prefault libvirt install"
        elif not status.current:
            yield "  this file is from another version of qemu-prefault"
            yield "  -> qemu-prefault libvirt install"
    if status.plugin is not None:
        counters = status.plugin["counters"]
        yield (
            f"  running, {format_size(counters['prefaulted'])} prefaulted, "
            f"including {format_size(counters['again'])} prefaulted again, "
            f"{format_size(status.plugin['pending'])} pending"
        )
        if status.plugin["held"]:
            yield f"  prefaulting is on hold: {status.plugin['held']}"
    elif status.problem:
        yield f"  {status.problem}"
