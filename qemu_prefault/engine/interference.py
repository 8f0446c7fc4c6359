# SPDX-License-Identifier: GPL-2.0-or-later
"""Look out, during a run, for what somebody else does to the guest: resume, reset, migrate it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from ..errors import Code, FailedError, QemuPrefaultError, RefusedError
from ..qemu.monitor import EventStream
from ..qemu.queries import MIGRATION_OVER, read_migration
from .tally import RunTally
from .vm import Vm


class InterferenceMonitor:
    """Ends a run, with the reason, when what it rests on is changed.

    :ivar reason: why the run was ended; None while it goes on.
    :ivar prefaulting: the guest must not be resumed now.
    """

    def __init__(self, vm: Vm, tally: RunTally, end: Callable[[], None]) -> None:
        self.reason: QemuPrefaultError | None = None
        self.prefaulting = False
        self._vm = vm
        self._tally = tally
        self._end = end
        self._own_resumes = 0  # whose events are yet to come

    @contextlib.asynccontextmanager
    async def watched(self, *, abort_on_migration: bool) -> AsyncIterator[None]:
        """Keep watch during the block, and raise the reason at its end if there is one.

        :param abort_on_migration: End the run if a migration starts. False while we wait for an
            incoming one.
        """
        names = ("RESUME", "STOP", "RESET", "SHUTDOWN", "MIGRATION")
        with self._vm.monitor.events(*names) as events:
            tasks = [asyncio.create_task(self._follow_events(events))]
            if abort_on_migration:
                tasks.append(asyncio.create_task(self._follow_migrations()))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self.reason is not None:
            raise self.reason

    def interrupt(self, reason: QemuPrefaultError) -> None:
        """End the run; the first reason stands."""
        if self.reason is None:
            self.reason = reason
            self._end()

    def expect_resume(self) -> None:
        """We are about to resume the guest ourselves."""
        self._own_resumes += 1

    async def migration_started(self) -> bool:
        """Whether there is a migration now, by which the run is ended."""
        status = await read_migration(self._vm.monitor)
        if status in MIGRATION_OVER:
            return False
        self.interrupt(
            RefusedError(
                f"a migration was started during the run (query-migrate: {status})",
                "the run was ended, so that it does not dirty every page; prefault at the "
                "destination",
                code=Code.MIGRATION,
            )
        )
        return True

    async def _follow_migrations(self) -> None:
        """MIGRATION events come only if the capability is set, so ask."""
        while not await self.migration_started():
            await asyncio.sleep(1)

    async def _follow_events(self, events: EventStream) -> None:
        paused = not self._vm.state.running
        async for event in events:
            if event.name == "STOP":
                paused = True
            elif event.name == "RESET":
                self._tally.warnings[Code.RESET] = (
                    "the guest was reset during the run: firmware will run again"
                )
            elif event.name == "RESUME" and self._own_resumes:
                self._own_resumes -= 1
            elif event.name == "RESUME" and paused and self.prefaulting:
                self.interrupt(
                    FailedError(
                        "somebody resumed the guest while it was being prefaulted",
                        "what was done stays; run this again for the rest",
                        code=Code.RESUMED,
                    )
                )
