# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz output of the human monitor, decoded QMP replies, and QMP sessions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.base import Kind, Range, VcpuThread
from qemu_prefault.agents.qmp import COMMAND, QUERY, QmpAgent, offers_command
from qemu_prefault.engine.incoming import IncomingMigration, check_no_postcopy
from qemu_prefault.engine.options import Options
from qemu_prefault.engine.plan import select
from qemu_prefault.errors import CommandError, QemuPrefaultError
from qemu_prefault.host.procfs import Process
from qemu_prefault.qemu.events import EventStream
from qemu_prefault.qemu.hmp import (
    FlatRange,
    RamBlock,
    parse_gpa2hva,
    parse_mtree,
    parse_numa,
    parse_ramblocks,
)
from qemu_prefault.qemu.kvm_stats import read_stage2, read_vcpu_stats
from qemu_prefault.qemu.memory_map import firmware_ahead
from qemu_prefault.qemu.monitor import Monitor
from qemu_prefault.qemu.queries import (
    read_migration,
    read_running,
    read_status,
    read_vm_state,
)
from support.fuzz import Target, mutate_bytes, mutate_json, mutate_json_lines

Check = Callable[[Target], None]
ERRORS = QemuPrefaultError

DATA = Path(__file__).parents[1] / "data" / "monitor"


def capture(path: Path) -> dict[str, str]:
    """Return the replies in a captured session, as a mapping from command to reply."""
    parts = re.split(r"^### (?:HMP|QMP) (.*)\n", path.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=False))


CAPTURES = [capture(path) for path in sorted(DATA.glob("*.txt"))]
NUMA = b"2 nodes\nnode 0 cpus: 0\nnode 0 size: 512 MB\nnode 0 plugged: 0 MB\nnode 1 size: 9 MB\n"
GPA2HVA = b"Host virtual address for 0x100000 (pc.ram) is 0x7f43b3f00000\r\n"


def captured(command: str) -> list[bytes]:
    return [answers[command].encode() for answers in CAPTURES]


def text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """Return a function that decodes an input and parses the text.

    Invalid bytes become surrogates, which a JSON string can also contain.
    """
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


TEXTS = (
    Target("mtree", text(lambda t: firmware_ahead(parse_mtree(t))), captured("info mtree -f")),
    Target("ramblock", text(parse_ramblocks), captured("info ramblock")),
    Target("gpa2hva", text(parse_gpa2hva), [GPA2HVA]),
    Target("numa", text(parse_numa), [NUMA]),
)


@pytest.mark.parametrize("target", TEXTS, ids=lambda target: target.name)
def test_text(target: Target, check: Check) -> None:
    check(target)


# --- decoded JSON ---


class Answers(Monitor):
    """A monitor without a connection that returns a given reply to each command."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self.address = "answers"
        self.version, self.package = "10.0.0", ""
        self.vm_uuid = None
        self.command_timeout = 1.0
        self._answers = answers
        self._events = 0
        self._map: tuple[tuple[FlatRange, ...], tuple[RamBlock, ...]] | None = None

    @property
    def alive(self) -> bool:
        return True

    async def execute_raw(
        self, command: str, arguments: Mapping[str, object], *, timeout: float | None = None
    ) -> object:
        line = str(arguments.get("command-line", ""))
        if line.startswith("gpa2hva"):
            return self._gpa2hva(int(line.split()[1], 16))
        key = line or (f"{command} {arguments['property']}" if "property" in arguments else command)
        if key not in self._answers:
            raise CommandError(command, "GenericError", "no such command")
        return self._answers[key]

    def _gpa2hva(self, gpa: int) -> object:
        """Return the reply to ``gpa2hva`` that agrees with the other replies."""
        given = self._answers.get("gpa2hva")
        if given is not None:
            return given
        if self._map is None:
            texts = [str(self._answers[f"info {name}"]) for name in ("mtree -f", "ramblock")]
            self._map = parse_mtree(texts[0]), parse_ramblocks(texts[1])
        ranges, blocks = self._map
        for item in ranges:
            if item.start <= gpa < item.end:
                hva = next((b.hva for b in blocks if b.name == item.name), None) or 1 << 46
                place = hva + item.offset + gpa - item.start
                return f"Host virtual address for {gpa:#x} ({item.name}) is {place:#x}"
        return "No memory is mapped at this address"

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        stream = EventStream(names)
        stream.end()
        yield stream


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    """Yield a runner whose event loop is used for all inputs of a test."""
    with asyncio.Runner() as runner:
        yield runner


def answers(
    loop: asyncio.Runner,
    parse: Callable[[Monitor], Coroutine[Any, Any, object]],
    kind: type[Answers] = Answers,
) -> Callable[[bytes], object]:
    """Return a function that passes the replies in an input to ``parse``.

    The input is a JSON object with one reply for each command.
    """

    def run(data: bytes) -> object:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):  # see test_session
            return None
        return loop.run(parse(kind(document if isinstance(document, dict) else {})))

    return run


VCPUS = [
    {"cpu-index": n, "thread-id": 7 + n, "qom-path": f"/machine/unattached/device[{n}]",
     "target": "x86_64", "props": {"core-id": 0, "thread-id": 0, "socket-id": n, "node-id": 0}}
    for n in range(2)
]  # fmt: skip


def state_of(found: Mapping[str, str]) -> dict[str, object]:
    """Return the replies from which :func:`read_vm_state` reads a captured machine."""
    document: dict[str, object] = {
        "query-kvm": {"enabled": True, "present": True},
        "query-cpus-fast": VCPUS,
        "query-balloon": {"actual": 268435456},
        "query-migrate": {"status": "completed"},
        "query-dirty-rate": {"status": "unstarted", "sample-pages": 512},
        "qom-get type": "pc-q35-10.0-machine",
        "qom-get memory-backend": "/objects/ram0",
        "qom-list": [{"name": "ivshmem", "type": "child<ivshmem-plain>"}],
        "info numa": NUMA.decode(),
    }
    for command, answer in found.items():
        document[command] = answer
        if command.startswith("query"):
            document[command] = json.loads(answer)["return"]
        elif command == "info mtree -f":  # the other views would take most of the time
            document[command] = answer[answer.index("FlatView") :]
    return document


async def vm_state(monitor: Monitor) -> None:
    state = await read_vm_state(monitor)
    firmware_ahead(state.ranges)
    for target in select(state, Options()):
        assert target.hva > 0 and target.size > 0


SAMPLE = {
    "query-stats": [
        {"provider": "kvm", "qom-path": "/machine/unattached/device[0]",
         "stats": [{"name": "pages_4k", "value": 7}, {"name": "pages_2m", "value": 1},
                   {"name": "pages_1g", "value": 0}, {"name": "halt_hist", "value": [1, 2]},
                   {"name": "guest_mode", "value": False}]},
    ],
    "query-status": {"running": False, "status": "inmigrate"},
    "query-migrate": {"status": "active", "ram": {"total": 1}},
    "query-migrate-capabilities": [{"capability": "events", "state": True},
                                   {"capability": "postcopy-ram", "state": False}],
    "query-vcpu-dirty-limit": [],
}  # fmt: skip


async def small_queries(monitor: Monitor) -> None:
    for query in (read_running, read_status, read_migration, read_stage2, check_no_postcopy):
        with contextlib.suppress(ERRORS):
            await query(monitor)
    with contextlib.suppress(ERRORS):
        await read_vcpu_stats(monitor, ("guest_mode",))
    incoming = IncomingMigration(monitor, True, EventStream(()))
    with contextlib.suppress(ERRORS):
        await incoming.tell_events()
    with contextlib.suppress(ERRORS):
        await incoming._is_loaded()


JOBS = {
    "query-jobs": [{"id": "qemu-prefault-1-2-3", "type": "kvm-prefault", "status": "concluded",
                    "current-progress": 0, "total-progress": 1}],
    QUERY: {"ranges": [{"start": 0, "size": 4096, "mapped": 0, "populated": 0, "absent": 0,
                        "error-number": 14},
                       {"start": 4096, "size": 8192, "mapped": 8192, "populated": 0, "absent": 0}]},
    COMMAND: {},
    "job-dismiss": {},
    "job-cancel": {},
    "query-status": {"running": False, "status": "paused"},
    "query-migrate": {},
}  # fmt: skip


class FinishedJobs(Answers):
    """A monitor on which every job finishes immediately."""

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        with super().events(*names) as stream:
            stream.get = self._get  # type: ignore[method-assign]
            yield stream

    async def _get(self, timeout: float | None = None) -> Any:
        self._events += 1
        if self._events > 3:
            return None
        raise TimeoutError


async def jobs(monitor: Monitor) -> None:
    process = Process.find(os.getpid())
    agent = QmpAgent(process, monitor, lambda: (), [VcpuThread(7, 5, 0, index=0)])
    await offers_command(monitor)
    with contextlib.suppress(ERRORS):
        await agent.start()
    ranges = [Range(Kind.STAGE2, 0, 4096), Range(Kind.STAGE2, 4096, 8192)]
    await agent.run({0: ranges}, lambda done: None)


def dump(document: object) -> bytes:
    return json.dumps(document).encode()


def test_vm_state(loop: asyncio.Runner, check: Check) -> None:
    seeds = [dump(state_of(found)) for found in CAPTURES]
    check(Target("vm-state", answers(loop, vm_state), seeds, mutate_json, cost=10))


def test_small_queries(loop: asyncio.Runner, check: Check) -> None:
    parse = answers(loop, small_queries)
    check(Target("small-queries", parse, [dump(SAMPLE)], mutate_json, cost=2))


def test_jobs(loop: asyncio.Runner, check: Check) -> None:
    parse = answers(loop, jobs, FinishedJobs)
    check(Target("jobs", parse, [dump(JOBS)], mutate_json, cost=2))


# --- bytes ---

GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"},
                    "capabilities": ["oob"]}}  # fmt: skip
EVENT = {"event": "STOP", "timestamp": {"seconds": 1700000000, "microseconds": 5}, "data": {}}


def reply(number: int, **members: object) -> dict[str, object]:
    return {**members, "id": f"__qmp#{number:05d}"}


SESSIONS = [
    b"\r\n".join(dump(message) for message in messages) + b"\r\n"
    for messages in (
        [GREETING, {"return": {}}, reply(0, **{"return": SAMPLE["query-status"]}),
         reply(1, **{"return": "text"})],
        [GREETING, {"return": {}}, EVENT, reply(0, **{"return": {"running": True}}), EVENT,
         reply(1, error={"class": "GenericError", "desc": "no"})],
    )
]  # fmt: skip


def mutate_session(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    return rng.choice((mutate_bytes, mutate_json_lines))(rng, pool)


async def session(data: bytes) -> None:
    """Run two commands against a peer that sends the input and closes the connection.

    After each of the first four lines, the peer waits up to 2 ms for a request.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    lines = data.splitlines(keepends=True)

    async def talk() -> None:
        with contextlib.suppress(OSError), theirs:
            for line in lines[:4]:
                await loop.sock_sendall(theirs, line)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.002):
                        await loop.sock_recv(theirs, 4096)
            await loop.sock_sendall(theirs, b"".join(lines[4:]))

    async def dial() -> tuple[socket.socket, str]:
        return ours, "uuid"

    peer = asyncio.create_task(talk())
    try:
        async with (
            asyncio.timeout(20),
            Monitor.connect("x", connect_timeout=5, command_timeout=5, dial=dial) as monitor,
        ):
            with monitor.events() as events:
                with contextlib.suppress(ERRORS):
                    await read_running(monitor)
                with contextlib.suppress(ERRORS):
                    await monitor.hmp("info numa")
                while await events.get(5) is not None:
                    pass
    finally:
        peer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await peer
        theirs.close()


def test_session(loop: asyncio.Runner, check: Check) -> None:
    logging.getLogger("qemu").setLevel(logging.CRITICAL)
    parse: Callable[[bytes], object] = lambda data: loop.run(session(data))  # noqa: E731
    check(Target("session", parse, SESSIONS, mutate_session, cost=10))
