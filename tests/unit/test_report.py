# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the report as JSON and as a table, and the exit status."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault import errors
from qemu_prefault.cli.format import error_json, report_lines, table
from qemu_prefault.engine.report import ByteSums, Report, RunWarning, Seconds, SectionReport
from qemu_prefault.errors import ExitStatus, QemuPrefaultError
from qemu_prefault.host.kvm import Stage2Leaves
from qemu_prefault.units import format_size

MIB, GIB = 1 << 20, 1 << 30

RAM = SectionReport("pc.ram", MIB, 383 * MIB, 0x7F00_0010_0000, "anonymous", 0, 383 * MIB, None)
PLUGGED = SectionReport(
    "vm0", 4 * GIB, GIB, 0x7E00_0000_0000, "memfd, shared", 0, 0, "virtio-mem: must stay absent"
)
DONE = Report(
    agent="attach",
    pid=4711,
    qemu_version="10.0.13",
    qemu_status="prelaunch",
    kernel_release="6.12.107",
    pre_fault_memory=True,
    sections=(RAM, PLUGGED),
    bytes=ByteSums(383 * MIB, 10 * MIB, 383 * MIB, 0),
    before=Stage2Leaves(0, 0, 0),
    after=Stage2Leaves(512, 1, 0),
    seconds=Seconds(0.1, 0.25, 0.2500004, 0.2500004, 1 / 3),
    warnings=(RunWarning("firmware-ahead", "the guest's firmware has yet to run"),),
)
PARTIAL = replace(DONE, bytes=replace(DONE.bytes, remaining=4096))

# The fields of the JSON report and their types. Fields may be added but not renamed.
COUNT = {"4k": int, "2m": int, "1g": int}
CONTRACT: dict[str, Any] = {
    "schema": int,
    "agent": str,
    "qemu": {"pid": int, "version": str, "status": str},
    "kernel": {"release": str, "pre_fault_memory": bool},
    "sections": [
        {
            "name": str,
            "gpa": int,
            "size": int,
            "hva": int,
            "backing": str,
            "populated": int,
            "prefaulted": int,
            "skipped": (str, type(None)),
        }
    ],
    "bytes": {"requested": int, "populated": int, "prefaulted": int, "remaining": int},
    "stage2": {"before": COUNT, "after": COUNT},
    "seconds": {
        "populate": float,
        "prefault": float,
        "paused": float,
        "longest_pause": float,
        "total": float,
    },
    "warnings": [{"code": str, "text": str}],
    "dry_run": bool,
    "exit": int,
}


def check_shape(value: object, shape: Any, where: str = "") -> None:
    """Check that a value has the expected fields and types."""
    if isinstance(shape, dict):
        assert isinstance(value, dict) and set(value) == set(shape), where
        for key, inner in shape.items():
            check_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for item in value:
            check_shape(item, shape[0], f"{where}[]")
    else:
        allowed = shape if isinstance(shape, tuple) else (shape,)
        assert type(value) in allowed, (where, value)


def printed(report: Report) -> Any:
    """Return the object that ``--json`` prints."""
    return json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize("report", [DONE, PARTIAL, replace(DONE, dry_run=True)])
def test_json_contract(report: Report) -> None:
    check_shape(printed(report), CONTRACT)
    assert printed(report)["schema"] == 1


def test_json_values() -> None:
    report = printed(DONE)
    assert report["qemu"] == {"pid": 4711, "version": "10.0.13", "status": "prelaunch"}
    assert report["kernel"] == {"release": "6.12.107", "pre_fault_memory": True}
    assert report["bytes"] == {
        "requested": 383 * MIB,
        "populated": 10 * MIB,
        "prefaulted": 383 * MIB,
        "remaining": 0,
    }
    assert report["stage2"] == {
        "before": {"4k": 0, "2m": 0, "1g": 0},
        "after": {"4k": 512, "2m": 1, "1g": 0},
    }
    assert report["sections"][1]["skipped"] == "virtio-mem: must stay absent"
    assert report["warnings"][0]["code"] == "firmware-ahead"


def test_unknown_value_is_null() -> None:
    report = printed(replace(DONE, before=None, after=None, pre_fault_memory=None))
    assert report["stage2"] == {"before": None, "after": None}
    assert report["kernel"]["pre_fault_memory"] is None


def test_seconds_are_rounded_to_microseconds() -> None:
    assert printed(DONE)["seconds"] == {
        "populate": 0.1,
        "prefault": 0.25,
        "paused": 0.25,
        "longest_pause": 0.25,
        "total": 0.333333,
    }


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (DONE, ExitStatus.VERIFIED),
        (PARTIAL, ExitStatus.PARTIAL),
        (replace(PARTIAL, dry_run=True), ExitStatus.VERIFIED),
        (replace(DONE, bytes=ByteSums(0, 0, 0, 0)), ExitStatus.VERIFIED),
    ],
)
def test_verified_needs_every_requested_byte(report: Report, status: ExitStatus) -> None:
    assert report.exit_status == status
    assert printed(report)["exit"] == status


# --- errors ---

STATUS = {
    "FailedError": 1,
    "MonitorError": 1,
    "AgentError": 1,
    "InputError": 2,
    "PartialError": 3,
    "UnsupportedError": 4,
    "RefusedError": 5,
}


@pytest.mark.parametrize("name", STATUS)
def test_exit_status_of_each_error(name: str) -> None:
    error = getattr(errors, name)("it broke", "mend it")
    assert isinstance(error, QemuPrefaultError)
    assert json.loads(json.dumps(error_json(error))) == {
        "schema": 1,
        "error": {"code": type(error).code, "cause": "it broke", "remedy": "mend it"},
        "exit": STATUS[name],
    }
    assert str(error) == "it broke\nmend it"


def test_error_code_can_be_given() -> None:
    assert error_json(errors.RefusedError("no", code="monitor-busy"))["error"] == {
        "code": "monitor-busy",
        "cause": "no",
        "remedy": "",
    }
    assert errors.RefusedError.code == "refused"  # the class is unchanged


def errors_without_remedy(path: Path) -> list[str]:
    """Return the places that construct an error with a cause but without a remedy."""
    ours = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, QemuPrefaultError)
    } - {"LayoutError"}  # this class sets its remedy itself
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours:
            given = len(node.args) + sum(keyword.arg == "remedy" for keyword in node.keywords)
            if given < 2:
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_every_error_has_a_remedy() -> None:
    package = Path(errors.__file__).parent
    modules = [*package.rglob("*.py"), *(Path(__file__).parents[2] / "qmp_scripts").glob("*-*")]
    assert len(modules) > 80
    assert [place for path in modules for place in errors_without_remedy(path)] == []


# --- the table ---


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4096, "4.0 KiB"),
        (384 * MIB, "384.0 MiB"),
        (1536 * MIB, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size_format(number: int, text: str) -> None:
    assert format_size(number) == text


@given(st.integers(0, 1 << 60))
def test_size_rounding_error_is_bounded(number: int) -> None:
    value, unit = format_size(number).split()
    factor = 1 << (10 * ["B", "KiB", "MiB", "GiB", "TiB"].index(unit))
    assert abs(float(value) * factor - number) <= factor * 0.0501
    assert float(value) <= 1024 or unit == "TiB"


def test_table_columns_align() -> None:
    rows = [["pc.ram", "384.0 MiB", ""], ["a longer name", "1 B", "ROM"]]
    assert list(table(["section", "size", "note"], rows)) == [
        "section             size  note",
        "pc.ram         384.0 MiB",
        "a longer name        1 B  ROM",
    ]


def test_empty_table_is_its_heading() -> None:
    assert list(table(["section", "size"], [])) == ["section  size"]


def test_last_line_summarises() -> None:
    assert list(report_lines(DONE))[-1] == "verified: all 383.0 MiB requested"
    partial = list(report_lines(PARTIAL))[-1]
    assert partial == "PARTIAL: 4.0 KiB of 383.0 MiB are not accounted for"
    dry = list(report_lines(replace(DONE, dry_run=True)))[-1]
    assert dry == "dry run: 383.0 MiB requested, 10.0 MiB of that would be populated"


def test_text_has_sections_counters_times_and_warnings() -> None:
    text = "\n".join(report_lines(DONE))
    for words in (
        "pc.ram",
        "0x100000",
        "virtio-mem: must stay absent",
        "0 x 4K + 0 x 2M + 0 x 1G -> 512 x 4K + 1 x 2M + 0 x 1G  (0 B -> 4.0 MiB)",
        "guest paused 0.250",
        "warning (firmware-ahead): the guest's firmware has yet to run",
    ):
        assert words in text, words


def test_text_omits_absent_counters() -> None:
    assert "stage-2" not in "\n".join(report_lines(replace(DONE, before=None, after=None)))


def test_leaves_are_counted_by_size() -> None:
    assert Stage2Leaves(1, 2, 3).bytes == 4096 + 2 * 2 * MIB + 3 * GIB
