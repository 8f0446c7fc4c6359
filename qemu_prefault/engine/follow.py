# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep a guest prefaulted until QEMU exits, and report each run as an event.

If QEMU has loaded the plugin, the plugin keeps the guest prefaulted, and this module forwards the
plugin's events. Otherwise, this process polls the memory layout and KVM's counters. It prefaults
the guest when KVM has dropped stage-2 tables, or when memory has been added. This process reacts up
to a few seconds later than the plugin, and pauses the guest for each run.
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
from ..qemu.events import EventStream
from ..qemu.kvm_stats import read_stage2
from ..qemu.memory_map import firmware_ahead
from ..qemu.queries import VmState
from .options import AgentChoice, Options
from .plan import select
from .report import Report
from .run import prefault
from .vm import Vm

Event = dict[str, Any]

#: Seconds between two polls.
LOOK_SECONDS: Final = 1.0
#: Minimum time between two runs, in seconds. This minimum bounds the number of pauses if KVM drops
#: the guest's tables repeatedly.
LEAST_SECONDS_BETWEEN_RUNS: Final = 5.0
#: The tables count as dropped if less than this share of the bytes that were mapped after the last
#: run is still mapped.
DROPPED: Final = 0.5
#: Minimum time between two polls, in seconds.
LEAST_SECONDS_BETWEEN_POLLS: Final = 0.1
#: QMP events that cause an immediate poll.
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
    """Keep a guest prefaulted until QEMU exits.

    :param options: The options of each run. If the plugin prefaults the guest, the plugin uses its
        own options instead.
    :returns: An iterator over events. docs/reference/events.md lists the fields of an event.
    :raises QemuPrefaultError: If this process cannot connect to the plugin. If QEMU has no plugin,
        see :func:`follow_from_outside`.
    """
    attach = options.agent is AgentChoice.ATTACH
    socket = None if attach else find_control_socket(vm.process)
    if socket is not None:
        return follow_plugin(vm.process, socket)
    return follow_from_outside(vm, options)


async def follow_plugin(process: Process, socket: Path) -> AsyncIterator[Event]:
    """Yield the plugin's events (docs/reference/events.md) until QEMU exits."""
    async with Control.open(socket, process) as control:
        await control.ask("follow")
        while True:
            try:
                yield await control.event()
            except FailedError:
                return


async def follow_from_outside(vm: Vm, options: Options) -> AsyncIterator[Event]:
    """Prefault the guest now, and again when necessary, until QEMU exits.

    :raises QemuPrefaultError: If the first run is refused or fails. If a later run is refused or
        fails, the function yields an event instead.
    """
    with vm.monitor.events(*WAKE_UP) as events:
        loop = _FollowLoop(vm, options)
        yield await loop.run("started")
        while vm.monitor.alive:
            await asyncio.sleep(LEAST_SECONDS_BETWEEN_POLLS)
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
    """Wait for a QMP event, but at most until the next poll."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            await anext(events)
    except (TimeoutError, StopAsyncIteration):
        pass


class _FollowLoop:
    """The state of :func:`follow_from_outside` between its polls."""

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
        """Prefault the guest, and return an event that describes this run."""
        report = await prefault(self._vm, self._options)
        self._ran_at = time.monotonic()
        self._need = self._refusal = ""
        self._seen = self._layout = self._shape(self._vm.state)
        stage2 = await read_stage2(self._vm.monitor)
        self._kept = stage2.bytes if stage2 else 0
        return _event(why, report)

    async def poll(self) -> Event | None:
        """Poll the guest, and prefault it if necessary.

        :returns: An event that describes a run or a refused run. The result is None if no run was
            necessary or possible, or if an earlier event has reported the same refusal.
        """
        state = await self._vm.refresh()
        stage2 = await read_stage2(self._vm.monitor)
        shape, before = self._shape(state), self._seen
        self._seen = shape
        if shape == before and set(shape) - set(self._layout):
            self._need = "memory was added"
        elif stage2 is not None and stage2.bytes < self._kept * DROPPED:
            # Remember that a run is needed. If the run must wait, the guest's faults may refill the
            # tables meanwhile, and the counters then no longer show that KVM dropped them.
            self._need = "the tables were dropped"
        if not self._need or shape != before or firmware_ahead(state.ranges):
            return None  # no run is needed, or the layout is still changing
        if time.monotonic() - self._ran_at < LEAST_SECONDS_BETWEEN_RUNS:
            return None
        try:
            return await self.run(self._need)
        except (RefusedError, FailedError) as error:
            if not self._vm.monitor.alive or error.code == self._refusal:
                return None
            self._refusal = error.code  # report the same refusal only once
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
