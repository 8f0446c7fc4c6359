# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz the replies from the plugin's control socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qemu_prefault.agents.base import Kind, Range, VcpuThread
from qemu_prefault.agents.plugin import Control, PluginAgent
from qemu_prefault.agents.plugin_protocol import (
    parse_answer,
    parse_done,
    parse_event,
    parse_progress,
    parse_status,
)
from qemu_prefault.cli.format import event_line, status_lines
from qemu_prefault.errors import QemuPrefaultError
from qemu_prefault.host.procfs import Process
from qemu_prefault.libvirt.status import DomainStatus
from support.fuzz import Target, mutate_bytes, mutate_json_lines

Check = Callable[[Target], None]

COUNTERS = {"slots_created": 3, "populated": 1, "prefaulted": 8192, "again": 4096, "errors": 0,
            "prefault_seconds": 0.25}  # fmt: skip
STATUS = {"plugin": 1, "pid": 7, "loaded_by": "preload", "kvm": True, "pre_fault_memory": True,
          "keeping": True, "populate": "auto", "quirk": "disabled", "held": None,
          "vcpus": [{"id": 0, "fd": 9, "tid": 8, "running": False}], "slots": [],
          "pending": 0, "counters": COUNTERS}  # fmt: skip
EVENT = {"event": "prefaulted", "time": 1700000000.5, "why": "firmware", "gpa": 4096, "size": 8192,
         "bytes": 8192, "populated": 4096, "pending": 0, "seconds": 0.125}  # fmt: skip
DONE = {"done": [[4096, 0], [0, 14]], "seconds": 0.5}
RANGES = [Range(Kind.STAGE2, 0, 4096), Range(Kind.POPULATE, 4096, 4096)]


def lines(*documents: object) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


#: The replies to the requests of :func:`client`, in order.
SEEDS = [
    lines(STATUS, STATUS, {"ok": True}, {"progress": 4096}, DONE),
    lines(STATUS, STATUS | {"held": "migration"}, {"ok": True}, EVENT, DONE),
    lines(STATUS, {"error": "another batch runs", "code": "busy"}),
]


class Plugin:
    """A server that replies with the lines of an input."""

    def __init__(self) -> None:
        self.data = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers = self.data.splitlines(keepends=True)
        with contextlib.suppress(OSError):
            for line in [*answers[:2], b"".join(answers[2:])]:
                # After a timeout, the client waits for another line before its next request.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.002):
                        await reader.readline()
                writer.write(line)
                await writer.drain()
        writer.close()


async def client(socket: Path) -> None:
    """Connect, and use the replies as a run, ``--follow`` and ``libvirt status`` do."""
    process = Process.find(os.getpid())
    agent = PluginAgent(process, socket, [VcpuThread(8, 9, 0)])
    try:
        with contextlib.suppress(QemuPrefaultError):
            await agent.start()
            await agent.hold_vcpus()
            found = await agent.run({0: RANGES}, lambda done: None)
            assert all(type(o.done) is int for o in found.outcomes[0])
    finally:
        await agent.close()
    with contextlib.suppress(QemuPrefaultError):
        async with Control.open(socket, process) as control:
            status = await control.status()
            list(status_lines(DomainStatus("vm", None, False, False, True, status, "")))
            control.send("follow")
            for _ in range(3):
                event_line(await control.event())


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def mutate(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    return rng.choice((mutate_bytes, mutate_json_lines, mutate_json_lines))(rng, pool)


def test_answers(check: Check) -> None:
    """Check the parsers of replies alone, which is faster than through a socket."""

    def parse(data: bytes) -> None:
        for line in data.splitlines(keepends=True):
            with contextlib.suppress(QemuPrefaultError):
                answer = parse_answer(line, 7)
                for check_fields in (parse_status, parse_event, parse_progress):
                    with contextlib.suppress(QemuPrefaultError):
                        check_fields(answer, 7)
                if "done" in answer:
                    ranges, seconds = parse_done(answer, 2, 7)
                    assert all(0 <= size < 1 << 64 for size, _ in ranges) and seconds >= 0

    check(Target("plugin-answers", parse, SEEDS, mutate))


def test_control_socket(runner: asyncio.Runner, check: Check) -> None:
    plugin = Plugin()
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "control"

        def parse(data: bytes) -> None:
            plugin.data = data
            runner.run(client(socket))

        server = runner.run(asyncio.start_unix_server(plugin.serve, socket))
        try:
            check(Target("control-socket", parse, SEEDS, mutate, cost=10))
        finally:
            server.close()
