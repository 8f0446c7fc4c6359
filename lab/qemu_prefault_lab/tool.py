# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the command line beside a QEMU, and what is left of them in it. For tests."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Imported here once, for all runs that are forked.
from qemu_prefault.agents.base import Limits
from qemu_prefault.agents.gadgets import AREAS_FROM, AREAS_TO
from qemu_prefault.agents.ptrace import helper_threads
from qemu_prefault.cli.main import main

GRACE = Limits().dead_man + 9
"""Seconds until helpers have left whatever happened: the dead man's time, and a busy host's."""


@dataclass(frozen=True, slots=True)
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
    def warnings(self) -> set[str]:
        return {warning["code"] for warning in self.report["warnings"]}

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = self.report["error"]
        assert set(error) == {"code", "cause", "remedy"} and all(error.values()), error
        return error


class Tool:
    """A run of the command line in a process of its own.

    It is forked, not executed: Python's start is the same each time, and takes most of the
    time under emulation.
    """

    def __init__(self, arguments: Sequence[str], uid: int | None = None) -> None:
        """``uid``: become this user first, who need not be able to read our Python."""
        self._uid = uid
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments)
        self._pidfd = os.pidfd_open(self.pid)

    def _become(self, arguments: Sequence[str]) -> NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            for number, file in zip((1, 2), self._files, strict=True):
                os.dup2(file.fileno(), number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["qemu-prefault", *arguments]
            if self._uid is not None:
                os.setgroups([])
                os.setresgid(self._uid, self._uid, self._uid)
                os.setresuid(self._uid, self._uid, self._uid)
            # Whoever started us in the background made us, and all we fork, ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
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

    def finish(self, timeout: float = 120) -> Result:
        """Wait for its end. A run that does not end says where it is, and is a failure."""
        hung = self.running(timeout)
        if hung:
            self.send_signal(signal.SIGUSR2)
            self.running(1)
            self.send_signal(signal.SIGKILL)
            self.running(10)
        stdout, stderr = self._read(0), self._read(1)
        assert not hung, f"the tool did not end within {timeout:g} s: {stderr}"
        assert self.status is not None
        assert "Traceback" not in stderr and "internal error" not in stderr, stderr
        return Result(self.status, stdout, stderr)

    def has_said(self, text: str) -> bool:
        """Whether this is on its stderr already."""
        return text in self._read(1)

    def _read(self, index: int) -> str:
        fd = self._files[index].fileno()  # its offset is the run's own
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()


def leftovers(pid: int) -> list[str]:
    """Helper threads and helper mappings in a process."""
    found = [f"thread {tid}" for tid in helper_threads(pid)]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if AREAS_FROM <= int(line.split("-")[0], 16) < AREAS_TO:
            found.append(line)
    return found


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


def wait_for(condition: Callable[[], object], what: str, limit: float = GRACE) -> float:
    """Wait for a state of another process that offers no event; give the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


def wait_clean(pid: int) -> float:
    """Wait until nothing of the tool is left in a process."""
    return wait_for(lambda: not leftovers(pid), f"nothing of the tool left in process {pid}")
