# SPDX-License-Identifier: GPL-2.0-or-later
"""Pause the guest, and restore its run state afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from ..agents.base import Agent, resumed_error
from ..errors import Code, MonitorError, QemuPrefaultError, RefusedError
from ..qemu.monitor import Monitor
from ..qemu.queries import read_running, read_status
from .interference import InterferenceMonitor
from .preflight import MIGRATED_AWAY
from .resume_guard import ResumeGuard
from .tally import RunTally

#: The time limit for each QMP command in a pause, in seconds. It does not apply to TCP connections
#: and to libvirt, which can itself wait for 30 seconds.
REPLY_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause of the guest.

    :ivar resume: A coroutine function that ends the pause. It resumes the guest if ``will_resume``
        is True.
    :ivar will_resume: True if the guest ran before the pause, or if ``--cont`` was used.
    """

    resume: Callable[[], Awaitable[None]]
    will_resume: bool


class Pauser:
    """Pauses a guest once or several times.

    :ivar cont: Whether to resume the guest even if it was paused before.
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
        """Pause the guest for the block, and restore its run state afterwards.

        Without the pause, the prefault ioctl would wait for ``vcpu->mutex`` until KVM_RUN returns
        (kvm_vcpu_ioctl(), virt/kvm/kvm_main.c). The block should call :attr:`Pause.resume` as soon
        as possible.
        """
        monitor, agent, interference = self._monitor, self._agent, self._interference
        # Query the state again, because the operator may have paused the guest while the run
        # populated it.
        was_running = await read_running(monitor)
        guard = ResumeGuard(monitor.fileno(), agent.orphan_cleanup())
        stopped_at = 0.0

        async def resume() -> None:
            nonlocal stopped_at
            interference.prefaulting = False
            await agent.release_vcpus()
            # If another client has interfered, leave the guest in the state that the client chose.
            if was_running or (self.cont and interference.reason is None):
                await self.resume(was_running, guard)
            if stopped_at:
                self._tally.count_pause(stopped_at)
                stopped_at = 0.0

        pause = Pause(resume, was_running or self.cont)
        if not was_running:
            interference.prefaulting = True
            await self._hold_vcpus()
            yield pause
            return
        seconds = REPLY_SECONDS if monitor.is_local else monitor.command_timeout
        hung = False
        with guard, monitor.patience(seconds):
            async with guard.hand_over_on_failure(monitor):
                stopped_at = time.monotonic()
                try:
                    await monitor.execute("stop")
                    interference.prefaulting = True
                    await self._hold_vcpus()
                    yield pause
                except MonitorError as error:
                    hung = error.code is Code.MONITOR_TIMEOUT
                    raise
                finally:
                    if stopped_at and monitor.alive:  # the block has not resumed the guest
                        agent.abort()
                        with contextlib.suppress(QemuPrefaultError):
                            await agent.close()
                        if not hung:
                            await resume()

    async def _hold_vcpus(self) -> None:
        if await self._agent.hold_vcpus() and await read_running(self._monitor):
            self._interference.interrupt(resumed_error())

    async def resume(self, was_running: bool, guard: ResumeGuard | None = None) -> None:
        """Resume the guest, unless it has migrated away and runs on the destination.

        :param was_running: Whether the guest ran before the pause. If False, the method does not
            resume the guest while a migration is running.
        :param guard: The resume guard of the pause, if the run has paused the guest.
        """
        monitor = self._monitor
        status = await read_status(monitor)
        if status in MIGRATED_AWAY:
            self._interference.interrupt(
                RefusedError(
                    f"the guest migrated away during the run (query-status: {status}), so it was "
                    "not resumed here",
                    "prefault the guest on the destination",
                    code=Code.MIGRATION,
                ),
            )
        elif was_running or not await self._interference.migration_started():
            self._interference.expect_resume()
            if guard is not None:
                guard.cont_sent = True
            await monitor.execute("cont")
