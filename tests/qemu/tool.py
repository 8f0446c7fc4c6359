# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the command line beside a real QEMU, and what is left of them in it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Qemu, StartQemu

import qemu_prefault.engine
import qemu_prefault.probe
import qemu_prefault.survey  # noqa: F401
from qemu_prefault.agents.attach import AREAS_FROM, AREAS_TO, helper_threads
from qemu_prefault.cli import main

MIB = 1 << 20
DEAD_MAN = 3.0
"""Seconds after which helpers leave when their tool does not live (agents.attach.Limits)."""
GRACE = DEAD_MAN + 7
"""The same, on a host that is busy with other things."""


@dataclass(frozen=True)
class Result:
    """What a run came to. ``stdout`` holds JSON if the run was asked for it."""

    status: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.stdout)
        return answer

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = self.report["error"]
        assert set(error) == {"code", "cause", "remedy"} and all(error.values()), error
        return error


class Tool:
    """A run of the command line, forked from here: Python's start is the same each time."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments)
        self._pidfd = os.pidfd_open(self.pid)

    def _become(self, arguments: Sequence[str]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            for number, file in zip((1, 2), self._files, strict=True):
                os.dup2(file.fileno(), number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["qemu-prefault", *arguments]
            faulthandler.register(signal.SIGUSR2, file=2)
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else bool(exit_.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self, timeout: float = 0) -> bool:
        """Whether it still runs ``timeout`` seconds from now."""
        if self.status is None and select.select([self._pidfd], [], [], timeout)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.status is None

    def send_signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def finish(self, timeout: float = 60) -> Result:
        """Wait for its end."""
        if self.running(timeout):
            self.send_signal(signal.SIGUSR2)  # where it is, to stderr
            self.running(1)
            self.send_signal(signal.SIGKILL)
            assert not self.running(10)
            pytest.fail(f"the tool did not end within {timeout} s: {self._read(1)}")
        assert self.status is not None
        stdout, stderr = self._read(0), self._read(1)
        assert "Traceback" not in stderr, stderr
        assert "internal error" not in stderr, stderr
        return Result(self.status, stdout, stderr)

    def _read(self, index: int) -> str:
        self._files[index].seek(0)
        return self._files[index].read().decode()


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


def resident_bytes(pid: int, address: int) -> int:
    """Rss of the mapping that holds the address, as the kernel counts it in smaps."""
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError(f"nothing is mapped at {address:#x}")


def leftovers(pid: int) -> list[str]:
    """Helper threads and helper mappings in a process."""
    found = [f"thread {tid}" for tid in helper_threads(pid)]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if AREAS_FROM <= int(line.split("-")[0], 16) < AREAS_TO:
            found.append(line)
    return found


def tracers(pid: int) -> set[str]:
    """Who traces any thread of the process."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for line in (task / "status").read_text().splitlines():
                if line.startswith("TracerPid:"):
                    found.add(line.split()[1])
    return found - {"0"}


def wait_for(condition: Callable[[], bool], what: str, limit: float = GRACE) -> None:
    """Wait for a state of another process that offers no event to wait for."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.01)


def wait_clean(pid: int) -> None:
    wait_for(lambda: not leftovers(pid), f"nothing left of the tool in {pid}")
