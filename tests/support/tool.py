# SPDX-License-Identifier: GPL-2.0-or-later
"""Run ``qemu-prefault`` as a process and collect its result."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


def _import_product() -> Callable[[], None]:
    """Import the modules that a forked run needs, and return the tool's main().

    The imports are not at the top of the file, because avocado-vt's ``qemu`` package hides
    qemu.qmp.
    """
    import qemu_prefault.api  # noqa: PLC0415
    import qemu_prefault.logs  # noqa: F401, PLC0415
    from qemu_prefault.cli.main import main  # noqa: PLC0415

    return main


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run.

    With ``--json``, ``stdout`` contains JSON.
    """

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

    def complete(self) -> dict[str, Any]:
        """Check that the run verified every requested byte, and return its report."""
        assert self.status == 0, (self.status, self.stdout, self.stderr)
        report = self.report
        assert report["bytes"]["remaining"] == 0, report
        return report


class Tool:
    """A run of ``qemu-prefault`` in a child process.

    By default, the child is a fork of this process and does not execute a new Python. Under
    emulation, a run would spend most of its time on starting Python.

    :param uid: The id of the user as which the tool runs. This user does not need permission to
        read Python's files.
    :param fork: Fork without executing a new Python. A caller with several threads must pass False.
    """

    def __init__(
        self, arguments: Sequence[str], uid: int | None = None, *, fork: bool = True
    ) -> None:
        assert fork or uid is None
        self._uid = uid
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.status: int | None = None
        if fork:
            main = _import_product()
            self.pid = os.fork()
            if self.pid == 0:
                self._become(main, arguments)
        else:
            self.pid = self._spawn(arguments)
        self._pidfd = os.pidfd_open(self.pid)

    def _become(self, main: Callable[[], None], arguments: Sequence[str]) -> NoReturn:
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
            # If the tests run as a background job, SIGINT is ignored, and the child inherits this.
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

    def _spawn(self, arguments: Sequence[str]) -> int:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            *(
                (os.POSIX_SPAWN_DUP2, file.fileno(), number)
                for number, file in zip((1, 2), self._files, strict=True)
            ),
        ]
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "qemu_prefault", *arguments],
            os.environ,
            file_actions=actions,
            setpgroup=0,
            setsigdef=[signal.SIGINT],
        )

    def running(self, timeout: float = 0) -> bool:
        """Wait for up to ``timeout`` seconds, and return whether the tool still runs."""
        if self.status is None and select.select([self._pidfd], [], [], timeout)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.status is None

    def send_signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def wait_ready(self, timeout: float = 300) -> None:
        """Wait until the tool is ready for an incoming guest."""
        for _ in range(int(timeout / 0.05)):
            if self.has_said("ready"):
                return
            if not self.running(0.05):
                break
        assert self.has_said("ready"), f"the tool is not ready for a guest: {self._read(1)}"

    def finish(self, timeout: float = 120) -> Result:
        """Wait until the tool exits.

        If it hangs, kill it and fail with its stack trace.
        """
        hung = self.running(timeout)
        if hung:
            self.send_signal(signal.SIGUSR2)
            self.running(1)
            self.send_signal(signal.SIGKILL)
            self.running(10)
        stdout, stderr = self._read(0), self._read(1)
        assert not hung, f"the tool did not exit within {timeout:g} s: {stderr}"
        assert self.status is not None
        assert "Traceback" not in stderr and "internal error" not in stderr, stderr
        return Result(self.status, stdout, stderr)

    def has_said(self, text: str) -> bool:
        """Return whether the tool has printed this text to stderr."""
        return text in self._read(1)

    def _read(self, index: int) -> str:
        fd = self._files[index].fileno()  # pread() does not move the tool's file offset
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()
