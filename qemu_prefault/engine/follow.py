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

from ..agents.plugin import Control, find_control_socket
from ..errors import FailedError, QemuPrefaultError, RefusedError
from ..host.procfs import Process
from ..qemu.memory_map import firmware_ahead
from ..qemu.monitor import EventStream
from ..qemu.queries import VmState, read_stage2
from .options import AgentChoice, Options
from .plan import select
from .report import Report
from .run import prefault
from .vm import Vm

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


def follow(vm: Vm, options: Options) -> AsyncIterator[Event]:
    """Events of what is prefaulted again, until QEMU ends.

    :param options: what to prefault; the plugin, where there is one, has its own.
    :raises QemuPrefaultError: as :func:`follow_from_outside`.
    """
    attach = options.agent is AgentChoice.ATTACH
    socket = None if attach else find_control_socket(vm.process)
    if socket is not None:
        return follow_plugin(vm.process, socket)
    return follow_from_outside(vm, options)


async def follow_plugin(process: Process, socket: Path) -> AsyncIterator[Event]:
    """The plugin's events, until QEMU ends; see README.md for their fields."""
    async with Control.open(socket, process.pid) as control:
        await control.ask("follow")
        while True:
            try:
                yield await control.receive()
            except FailedError:
                return


async def follow_from_outside(vm: Vm, options: Options) -> AsyncIterator[Event]:
    """Run once, then again whenever it is needed, until QEMU ends.

    :raise QemuPrefaultError: the first run failed; later ones that are refused are events.
    """
    with vm.monitor.events(*WAKE_UP) as events:
        loop = _FollowLoop(vm, options)
        yield await loop.run("started")
        while vm.monitor.alive:
            await _wait(events)
            try:
                event = await loop.poll()
            except QemuPrefaultError:
                if vm.monitor.alive:
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


class _FollowLoop:
    def __init__(self, vm: Vm, options: Options) -> None:
        self._vm = vm
        self._options = options
        self._layout: tuple[tuple[int, int, int], ...] = ()
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self._kept = 0
        self._need = ""
        self._ran_at = 0.0
        self._refusal = ""

    async def run(self, why: str) -> Event:
        report = await prefault(self._vm, self._options)
        self._ran_at = time.monotonic()
        self._need = self._refusal = ""
        self._seen = self._layout = self._shape(self._vm.state)
        stage2 = await read_stage2(self._vm.monitor)
        self._kept = stage2.bytes if stage2 else 0
        return _event(why, report)

    async def poll(self) -> Event | None:
        """One look at the guest: None if all is well, else what was done about it."""
        state = await self._vm.refresh()
        stage2 = await read_stage2(self._vm.monitor)
        shape, before = self._shape(state), self._seen
        self._seen = shape
        if shape == before and set(shape) - set(self._layout):
            self._need = "memory was added"
        elif stage2 is not None and stage2.bytes < self._kept * DROPPED:
            # Not forgotten if it cannot be done at once: the guest fills them, fault by fault.
            self._need = "the tables were dropped"
        if not self._need or shape != before or firmware_ahead(state.ranges):
            return None  # all is well, or it is still changing
        if time.monotonic() - self._ran_at < LEAST_SECONDS_BETWEEN_RUNS:
            return None
        try:
            return await self.run(self._need)
        except (RefusedError, FailedError) as error:
            if not self._vm.monitor.alive or error.code == self._refusal:
                return None
            self._refusal = error.code  # it is told once, and waited out
            return {"event": "held", "time": time.time(), "why": f"{error.cause}; {error.remedy}"}

    def _shape(self, state: VmState) -> tuple[tuple[int, int, int], ...]:
        targets = select(state, self._options)
        return tuple((target.gpa, target.size, target.hva) for target in targets)


def _event(why: str, report: Report) -> Event:
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
