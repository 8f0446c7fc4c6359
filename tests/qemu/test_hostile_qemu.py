# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool, the libvirt hook and the metrics with a process that plays QEMU and lies.

A guest that has taken over its QEMU controls everything that they read from QEMU. In all cases,
they must end soon, use little memory, print no escape sequence and touch no other process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault._native import ffi
from support import hostile_qemu
from support.qemu import MIB, kvm_usable

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm is not usable"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user"),
]

#: The maximum time of a run in seconds, and the maximum of its memory beyond that of an honest run.
SECONDS, MEMORY = 10, 64 * MIB
#: The statuses of docs/reference/exit-status.md.
STATUSES = {0, 1, 2, 3, 4, 5}
UUID = "6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d12"
DOMAIN = f"""<domain type='kvm'>
  <name>lies</name>
  <uuid>{UUID}</uuid>
  <metadata><p:hook xmlns:p='urn:qemu-prefault:1' restore='now'/></metadata>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
</domain>
"""
#: A program that reads the metrics of the domain once, as the daemon does for each scrape.
SCRAPE = f"""
from types import SimpleNamespace
from prometheus_client import generate_latest
from qemu_prefault.libvirt.metrics import Metrics
daemon = SimpleNamespace(connected=True, on_run=[], running={{"{UUID}": "lies"}})
print(generate_latest(Metrics(daemon).registry).decode(), end="")
"""
#: One lie of each kind. make test-full tells all of them.
SELECTED = {
    "honest",
    "monitor: endless answer",
    "query-cpus-fast: init's thread",
    "process: endless arguments",
    "process: escapes in names",
    "text: sparse libc of 1.5 GiB",
    "text: false instructions",
    "process: executes another program",
    "helper: tid of another process",
    "helper: batch never done",
}
LIES = [
    name if name in SELECTED else pytest.param(name, marks=pytest.mark.full)
    for name in hostile_qemu.LIES
]


@dataclass(frozen=True)
class Run:
    """A run of a program, with its largest resident memory in bytes."""

    status: int
    output: str
    memory: int


def run_tool(*arguments: str, stdin: str = "", **environment: str) -> Run:
    return run_python("-m", "qemu_prefault", *arguments, stdin=stdin, **environment)


def run_python(*arguments: str, stdin: str = "", **environment: str) -> Run:
    with tempfile.TemporaryFile() as text_in, tempfile.TemporaryFile() as output:
        text_in.write(stdin.encode())
        text_in.seek(0)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=text_in,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        killer = threading.Timer(SECONDS, process.kill)
        killer.start()
        _, status, usage = os.wait4(process.pid, 0)
        killer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="surrogateescape")
    return Run(process.returncode, text, usage.ru_maxrss << 10)


@pytest.fixture
def bystander() -> Iterator[int]:
    """Start a process that no run may touch, and return its pid."""
    program = "import signal; print(flush=True); signal.pause()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, process.pid, 5)
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        yield process.pid
        assert process.poll() is None
        process.kill()


def state_of(pid: int) -> list[object]:
    """Return the state of a process that a run could change."""
    return [
        os.sched_getscheduler(pid),
        os.sched_getaffinity(pid),
        os.getpriority(os.PRIO_PROCESS, pid),
        Path(f"/proc/{pid}/cgroup").read_text(),
        Path(f"/proc/{pid}/maps").read_text(),
    ]


Start = Callable[[str], Path]


@pytest.fixture
def start(bystander: int) -> Iterator[Start]:
    """Return a function that starts a false QEMU and returns the path of its monitor."""
    started: list[subprocess.Popen[str]] = []
    header = ffi.typeof("struct prefault_control")
    offsets = {name: ffi.offsetof("struct prefault_control", name) for name, _ in header.fields}

    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)

        def run(lie: str) -> Path:
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
                },
            )
            started.append(process)
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().strip() == str(process.pid), process.stderr.read()
            pid_file = Path(directory, "libvirt/qemu/run/lies.pid")
            pid_file.parent.mkdir(parents=True)
            pid_file.write_text(str(process.pid))
            return path

        yield run
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def honest_memory() -> int:
    return run_tool("--version").memory + 40 * MIB


def unprintable(text: str) -> set[str]:
    return {c for c in text if not (c.isprintable() or c == "\n")}


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_harmless(start: Start, bystander: int, honest_memory: int, lie: str) -> None:
    before = state_of(bystander)
    path = start(lie)
    runtime = {"XDG_RUNTIME_DIR": str(path.parent)}
    scrape = run_python("-c", SCRAPE, **runtime)
    assert scrape.status == 0, scrape
    assert 'qemu_prefault_domain_up{domain="lies"}' in scrape.output
    for operation in ("restore", "started"):
        hook = run_tool(
            *("libvirt", "hook", "lies", operation, "begin", "-"), stdin=DOMAIN, **runtime
        )
        assert hook.status == 0, hook
    run = run_tool("--qmp", str(path), "--populate-only")
    assert run.status in STATUSES, run
    assert state_of(bystander) == before
    for output in (scrape.output, hook.output, run.output):
        assert not any(text in output for text in ("Traceback", "internal error", "bug")), output
        assert unprintable(output) == set(), output
    for memory in (scrape.memory, hook.memory, run.memory):
        assert memory < honest_memory + MEMORY
    if lie == "honest":
        assert 'qemu_prefault_plugin{domain="lies"} 0.0' in scrape.output
        assert run.status == 0, run.output
        assert "will be prefaulted" in hook.output or "MiB prefaulted" in hook.output, hook.output
