# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the command line beside a real QEMU, and what is left of them in it."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import Qemu, StartQemu

from qemu_prefault_lab.tool import Result, Tool, leftovers, resident_bytes, wait_clean, wait_for

__all__ = ["Result", "Tool", "leftovers", "resident_bytes", "wait_clean", "wait_for"]

MIB = 1 << 20


def start_tool(qemu: Qemu, *arguments: str) -> Tool:
    return Tool(["--qmp", qemu.qmp, "--json", *arguments])


def run_tool(qemu: Qemu, *arguments: str) -> Result:
    return start_tool(qemu, *arguments).finish()


class Qmp:
    """A plain QMP client, for a second monitor: what the tool does is seen from aside."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")
        self.events: list[dict[str, Any]] = []
        assert "QMP" in json.loads(self._file.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, (command, answer)

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line, "QEMU closed the monitor"
        answer: dict[str, Any] = json.loads(line)
        if "event" in answer:
            self.events.append(answer)
        return answer

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The first event, seen already or yet to come, with this name and at least this data."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                seen += 1
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return event
            self._receive()

    def status(self) -> str:
        status: str = self.execute("query-status")["status"]
        return status

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@dataclass
class Vm:
    """A QEMU, and a second monitor of it that the tool does not touch."""

    qemu: Qemu
    qmp: Qmp

    @property
    def pid(self) -> int:
        return self.qemu.pid

    def prefault(self, *arguments: str) -> Result:
        return run_tool(self.qemu, *arguments)

    def command(self, name: str, *arguments: str) -> Result:
        """Another command than the main one: probe, map, stats."""
        return Tool([name, "--qmp", self.qemu.qmp, "--json", *arguments]).finish()


def start_vm(
    start_qemu: StartQemu, tmp_path: Path, *arguments: str, accel: str = "tcg", paused: bool = True
) -> Vm:
    number = len(list(tmp_path.glob("aside*")))
    aside = tmp_path / f"aside{number}"
    monitor = ("-qmp", f"unix:{aside},server=on,wait=off")
    qemu = start_qemu(*monitor, *arguments, accel=accel, paused=paused)
    return Vm(qemu, Qmp(str(aside)))


def anonymous_bytes(pid: int) -> int:
    """RssAnon: private memory that the process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


def tracers(pid: int) -> set[str]:
    """Who traces any thread of the process."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for line in (task / "status").read_text().splitlines():
                if line.startswith("TracerPid:"):
                    found.add(line.split()[1])
    return found - {"0"}
