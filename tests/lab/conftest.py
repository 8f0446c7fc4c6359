# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that run where the real ioctl is: in the lab, or on a host with TDP."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qemu_prefault.engine
import qemu_prefault.probe
import qemu_prefault.survey  # noqa: F401
from qemu_prefault.agents.attach import AREAS_FROM, AREAS_TO, helper_threads
from qemu_prefault.cli import main
from qemu_prefault.lab.guest import Guest, thp

OTHER_MIB = 96
"""What a guest has beside its workload's memory: its kernel, and memory it never touches."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="how often to kill the tool")
    parser.addoption("--seed", type=int, default=0, help="of random moments; 0: a new one")


@dataclass(frozen=True)
class Result:
    """What a run of the command line came to; ``report`` is its JSON."""

    status: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def warnings(self) -> set[str]:
        return {warning["code"] for warning in self.report["warnings"]}

    @property
    def error(self) -> dict[str, str]:
        return self.report["error"]


class Tool:
    """A run of the command line in a process of its own.

    It is forked, not executed: under emulation Python's start would take most of the time.
    The imports below are done once, for all runs.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                for number, file in zip((1, 2), self._files, strict=True):
                    os.dup2(file.fileno(), number)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                sys.argv = ["qemu-prefault", *arguments]
                main()
                code = 0
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else bool(exit_.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self._pidfd = os.pidfd_open(self.pid)

    def running(self, timeout: float = 0) -> bool:
        """Whether it still runs ``timeout`` seconds from now."""
        if self.status is None and select.select([self._pidfd], [], [], timeout)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.status is None

    def send_signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def finish(self, timeout: float = 120) -> Result:
        """Wait for its end."""
        if self.running(timeout):
            self.send_signal(signal.SIGKILL)
            assert not self.running(10)
            pytest.fail(f"the tool did not end within {timeout} s: {self._read(1)}")
        assert self.status is not None
        stdout, stderr = self._read(0), self._read(1)
        assert "Traceback" not in stderr, stderr
        return Result(self.status, stdout, stderr)

    def _read(self, index: int) -> str:
        self._files[index].seek(0)
        return self._files[index].read().decode()


def start_tool(guest: Guest, *arguments: str) -> Tool:
    return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments])


def prefault(guest: Guest, *arguments: str) -> Result:
    """Run ``qemu-prefault --qmp … --json`` on a guest."""
    return start_tool(guest, *arguments).finish()


def faults(guest: Guest) -> int:
    return guest.stats()["pf_taken"]


def leftovers(guest: Guest) -> list[str]:
    """Helper threads and helper mappings in a guest's QEMU."""
    found = [f"thread {tid}" for tid in helper_threads(guest.pid)]
    for line in Path(f"/proc/{guest.pid}/maps").read_text().splitlines():
        start = int(line.split("-")[0], 16)
        if AREAS_FROM <= start < AREAS_TO:
            found.append(line)
    return found


@pytest.fixture(scope="session", autouse=True)
def four_kilobyte_pages() -> Iterator[None]:
    """With 2 MiB pages there is little to win, and so little to see."""
    before = thp("never")
    yield
    thp(before)


@pytest.fixture(scope="session")
def saved_state(
    four_kilobyte_pages: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Path]:
    """States of guests that have written so many MiB; each kind is booted once."""
    states: dict[tuple[int, int], Path] = {}

    def state(smp: int, workload_mib: int) -> Path:
        key = (smp, workload_mib)
        if key not in states:
            path = tmp_path_factory.mktemp("state") / "saved"
            memory = workload_mib + OTHER_MIB
            with Guest(smp=smp, workload_mib=workload_mib, memory_mib=memory) as guest:
                guest.wait_ready()
                assert guest.command("pass")["bad"] == 0
                guest.save(path)
            states[key] = path
        return states[key]

    return state


@pytest.fixture
def restored(saved_state: Callable[[int, int], Path]) -> Iterator[Callable[..., Guest]]:
    """Makes guests with their memory loaded, paused, and nothing in stage 2."""
    guests: list[Guest] = []

    def restore(smp: int = 1, workload_mib: int = 32, **options: Any) -> Guest:
        guest = Guest(
            smp=smp,
            workload_mib=workload_mib,
            memory_mib=workload_mib + OTHER_MIB,
            incoming=saved_state(smp, workload_mib),
            paused=True,
            **options,
        )
        guests.append(guest)
        guest.wait_restored()
        return guest

    yield restore
    for guest in guests:
        guest.kill()


def ram_checksum(guest: Guest, backend: str = "ram") -> int:
    """CRC of the guest's RAM, read from QEMU's memory behind its back."""
    size = next(m["size"] for m in guest.qmp("query-memdev") if m["id"] == backend)
    hva = int(guest.hmp("gpa2hva 0").split()[-1], 16)
    value = 0
    fd = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    try:
        for at in range(0, size, 8 << 20):
            value = zlib.crc32(os.pread(fd, min(8 << 20, size - at), hva + at), value)
    finally:
        os.close(fd)
    return value
