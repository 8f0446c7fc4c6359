# SPDX-License-Identifier: GPL-2.0-or-later
"""Stay with a guest: tell what is prefaulted again, and why.

With the plugin in QEMU it is the plugin that acts, and its events are passed on. Without, the
memory layout and KVM's counters are watched from outside, and a run is made whenever tables
were dropped or memory was added. That is later than the plugin, by up to a few seconds, and
pauses the guest for each run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from .agents.plugin import Control
from .engine import Engine
from .errors import FailedError, QemuPrefaultError, RefusedError
from .layout import firmware_ahead
from .monitor import EventStream, Machine, read_stage2
from .plan import Policy, select
from .process import Process
from .report import Report
from .session import Session

Event = dict[str, Any]

LOOK_SECONDS: Final = 1.0
#: Between two runs, so that a guest whose tables never last is not paused all the time.
LEAST_SECONDS_BETWEEN_RUNS: Final = 5.0
#: Tables are taken for dropped when less than this share of what was there is left.
DROPPED: Final = 0.5
WAKE_UP: Final = (
    "RESET",
    "RESUME",
    "MEMORY_DEVICE_SIZE_CHANGE",
    "DEVICE_DELETED",
    "BALLOON_CHANGE",
    "MIGRATION",
    "SHUTDOWN",
)


async def follow_plugin(process: Process, socket: Path) -> AsyncIterator[Event]:
    """The plugin's events, until QEMU ends; see README.md for their fields."""
    async with Control.open(socket, process.pid) as control:
        await control.ask("follow")
        while True:
            try:
                yield await control.receive()
            except FailedError:
                return


async def follow_from_outside(session: Session, policy: Policy, agent: str) -> AsyncIterator[Event]:
    """Run once, then again whenever it is needed, until QEMU ends.

    :raise QemuPrefaultError: the first run failed; later ones that are refused are events.
    """
    with session.monitor.events(*WAKE_UP) as events:
        watcher = _Watcher(session, policy, agent)
        yield await watcher.run("started")
        while session.monitor.alive:
            await _wait(events)
            try:
                event = await watcher.look()
            except QemuPrefaultError:
                if session.monitor.alive:
                    raise
                return
            if event is not None:
                yield event


async def _wait(events: EventStream) -> None:
    """Until something happens that may matter, or a while has passed."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            await anext(events)
    except (TimeoutError, StopAsyncIteration):
        pass


class _Watcher:
    def __init__(self, session: Session, policy: Policy, agent: str) -> None:
        self._session = session
        self._policy = policy
        self._agent = agent
        self._layout: tuple[tuple[int, int, int], ...] = ()
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self._kept = 0
        self._need = ""
        self._ran_at = 0.0
        self._refusal = ""

    async def run(self, why: str) -> Event:
        engine = Engine(self._session, self._policy, agent=self._agent)
        report = await engine.run()
        self._ran_at = time.monotonic()
        self._need = self._refusal = ""
        self._seen = self._layout = self._shape(self._session.machine)
        stage2 = await read_stage2(self._session.monitor)
        self._kept = stage2.bytes if stage2 else 0
        return _told(why, report)

    async def look(self) -> Event | None:
        """One look at the guest: None if all is well, else what was done about it."""
        machine = await self._session.refresh()
        stage2 = await read_stage2(self._session.monitor)
        shape, before = self._shape(machine), self._seen
        self._seen = shape
        if shape == before and set(shape) - set(self._layout):
            self._need = "memory was added"
        elif stage2 is not None and stage2.bytes < self._kept * DROPPED:
            # Not forgotten if it cannot be done at once: the guest fills them, fault by fault.
            self._need = "the tables were dropped"
        if not self._need or shape != before or firmware_ahead(machine.ranges):
            return None  # all is well, or it is still changing
        if time.monotonic() - self._ran_at < LEAST_SECONDS_BETWEEN_RUNS:
            return None
        try:
            return await self.run(self._need)
        except (RefusedError, FailedError) as error:
            if not self._session.monitor.alive or error.code == self._refusal:
                return None
            self._refusal = error.code  # it is told once, and waited out
            return {"event": "held", "time": time.time(), "why": f"{error.cause}; {error.remedy}"}

    def _shape(self, machine: Machine) -> tuple[tuple[int, int, int], ...]:
        targets = select(machine, self._policy)
        return tuple((target.gpa, target.size, target.hva) for target in targets)


def _told(why: str, report: Report) -> Event:
    return {
        "event": "prefaulted",
        "time": time.time(),
        "why": why,
        "bytes": report.bytes.prefaulted,
        "populated": report.bytes.populated,
        "remaining": report.bytes.remaining,
        "seconds": report.seconds.prefault,
        "paused": report.seconds.paused,
    }
