# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep the guest from running for a while, and leave its run state as it was found."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from ..agents.base import Agent
from ..errors import Code, QemuPrefaultError, RefusedError
from ..qemu.monitor import Monitor
from ..qemu.queries import read_running, read_status
from .interference import InterferenceMonitor
from .preflight import MIGRATED_AWAY
from .resume_guard import ResumeGuard
from .tally import RunTally


@dataclass(frozen=True, slots=True)
class Pause:
    """A guest that is paused: ``resume`` leaves it as it was found, or as was asked for."""

    resume: Callable[[], Awaitable[None]]
    will_resume: bool


class Pauser:
    """Pauses one guest, as often as is asked for.

    :ivar cont: resume it also if it was found paused.
    """

    def __init__(
        self,
        monitor: Monitor,
        agent: Agent,
        interference: InterferenceMonitor,
        tally: RunTally,
        *,
        cont: bool,
    ) -> None:
        self.cont = cont
        self._monitor = monitor
        self._agent = agent
        self._interference = interference
        self._tally = tally

    @contextlib.asynccontextmanager
    async def pause(self) -> AsyncIterator[Pause]:
        """Hold the guest for the block, leave its run state as it was found.

        vCPU ioctls wait for KVM_RUN to return (vcpu->mutex), so the guest has to be stopped.
        What it yields resumes it as early as possible.
        """
        monitor, agent, interference = self._monitor, self._agent, self._interference
        # Asked anew: populating takes its time, and the operator may have paused the guest.
        was_running = await read_running(monitor)
        stopped_at = 0.0

        async def resume() -> None:
            nonlocal stopped_at
            interference.prefaulting = False
            # An interrupted run leaves the guest to whoever interrupted it.
            if was_running or (self.cont and interference.reason is None):
                await self.resume(was_running)
            if stopped_at:
                self._tally.count_pause(stopped_at)
                stopped_at = 0.0

        pause = Pause(resume, was_running or self.cont)
        if not was_running:
            interference.prefaulting = True
            yield pause
            return
        with ResumeGuard(monitor.fileno(), agent.orphan_cleanup()):
            stopped_at = time.monotonic()
            try:
                await monitor.execute("stop")
                interference.prefaulting = True
                yield pause
            finally:
                if stopped_at and monitor.alive:  # else the block has resumed it
                    agent.abort()
                    with contextlib.suppress(QemuPrefaultError):
                        await agent.close()
                    await resume()

    async def resume(self, was_running: bool) -> None:
        """Let the guest run, unless it has migrated away meanwhile: then it runs elsewhere.

        A guest that was found paused is not started under a migration either.
        """
        monitor = self._monitor
        status = await read_status(monitor)
        if status in MIGRATED_AWAY:
            self._interference.interrupt(
                RefusedError(
                    f"the guest migrated away during the run (query-status: {status}), and is "
                    "not resumed here",
                    "it lives at the destination; prefault it there",
                    code=Code.MIGRATION,
                ),
            )
        elif was_running or not await self._interference.migration_started():
            self._interference.expect_resume()
            await monitor.execute("cont")
