# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a false QEMU (hostile_qemu.py), and run qemu-prefault on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qemu_prefault._native import ffi

from . import hostile_qemu

#: The UUID on the command line of the false QEMU.
UUID = "6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d12"
#: The statuses of docs/reference/exit-status.md.
STATUSES = {0, 1, 2, 3, 4, 5}


@dataclass(frozen=True)
class Run:
    """A run of a program, with its largest resident memory in bytes."""

    status: int
    output: str
    memory: int

    def assert_orderly(self) -> None:
        """Check that the run has ended by itself, without an internal error or an escape."""
        assert self.status in STATUSES, self
        wrong = ("Traceback", "internal error", "bug")
        assert not any(text in self.output for text in wrong), self
        assert all(c.isprintable() or c == "\n" for c in self.output), self


def run_program(
    *words: str,
    seconds: float = 10,
    stdin: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Run a program, and kill it after ``seconds``."""
    with tempfile.TemporaryFile() as text_in, tempfile.TemporaryFile() as output:
        text_in.write(stdin.encode())
        text_in.seek(0)
        process = subprocess.Popen(
            words,
            stdin=text_in,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        _, status, usage = os.wait4(process.pid, 0)
        killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="surrogateescape")
    return Run(process.returncode, text, usage.ru_maxrss << 10)


def run_python(
    *arguments: str,
    seconds: float = 10,
    stdin: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Run Python, and kill it after ``seconds``."""
    words = (sys.executable, *arguments)
    return run_program(*words, seconds=seconds, stdin=stdin, environment=environment)


def run_tool(
    *arguments: str,
    seconds: float = 10,
    stdin: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Run qemu-prefault, and kill it after ``seconds``."""
    words = ("-m", "qemu_prefault", *arguments)
    return run_python(*words, seconds=seconds, stdin=stdin, environment=environment)


@contextmanager
def process_not_to_touch() -> Iterator[int]:
    """Start a process that no run may touch, and yield its pid."""
    program = "import signal; print(flush=True); signal.pause()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, process.pid, 5)
            os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
            before = state_of(process.pid)
            yield process.pid
            assert process.poll() is None
            assert state_of(process.pid) == before
        finally:
            process.kill()  # the end of the block waits for the process


def state_of(pid: int) -> list[object]:
    """Return the state of a process that a run could change."""
    return [
        os.sched_getscheduler(pid),
        os.sched_getaffinity(pid),
        os.getpriority(os.PRIO_PROCESS, pid),
        Path(f"/proc/{pid}/cgroup").read_text(),
        Path(f"/proc/{pid}/maps").read_text(),
    ]


@contextmanager
def false_qemu(lie: str, bystander: int) -> Iterator[Path]:
    """Start a false QEMU that tells a lie, and yield the path of its monitor.

    :param bystander: The pid of a process that the false QEMU claims as its own in some lies.
    """
    header = ffi.typeof("struct prefault_control")
    offsets = {name: ffi.offsetof("struct prefault_control", name) for name, _ in header.fields}
    offsets["done"] = offsets["ranges"] + ffi.offsetof("struct prefault_range", "done")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        path = Path(directory, "qmp")
        process = subprocess.Popen(
            [sys.executable, hostile_qemu.__file__, path, lie, "-uuid", UUID],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "CONTROL_OFFSETS": json.dumps(offsets),
                "BYSTANDER": str(bystander),
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
        )
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().strip() == str(process.pid), process.stderr.read()
            pid_file = Path(directory, "libvirt/qemu/run/lies.pid")
            pid_file.parent.mkdir(parents=True)
            pid_file.write_text(str(process.pid))
            yield path
        finally:
            process.kill()
            process.communicate()
