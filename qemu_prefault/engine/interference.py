# SPDX-License-Identifier: GPL-2.0-or-later
"""Detect that another client resumes, resets or migrates the guest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from ..agents.base import resumed_error
from ..errors import Code, QemuPrefaultError, RefusedError
from ..qemu.events import EventStream
from ..qemu.queries import MIGRATION_OVER, read_migration
from .tally import RunTally
from .vm import Vm


class InterferenceMonitor:
    """Ends a run when another client resumes or migrates the guest.

    :ivar reason: The error that ended the run, or None.
    :ivar prefaulting: Whether the run is prefaulting the guest. If True, the run ends when another
        client resumes the guest.
    """

    def __init__(self, vm: Vm, tally: RunTally, end: Callable[[], None]) -> None:
        self.reason: QemuPrefaultError | None = None
        self.prefaulting = False
        self._vm = vm
        self._tally = tally
        self._end = end
        #: Number of resumes by this process whose events have not arrived yet.
        self._own_resumes = 0

    @contextlib.asynccontextmanager
    async def watched(self, *, abort_on_migration: bool) -> AsyncIterator[None]:
        """Detect interference in the block, and raise :attr:`reason` after the block.

        :param abort_on_migration: Whether to end the run if a migration starts. This must be False
            if the run waits for an incoming migration.
        :raises QemuPrefaultError: If another client's interference has ended the run.
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
        """End the run for a reason, unless an earlier reason has ended the run."""
        if self.reason is None:
            self.reason = reason
            self._end()

    def expect_resume(self) -> None:
        """Ignore the next RESUME event, because this process resumes the guest."""
        self._own_resumes += 1

    async def migration_started(self) -> bool:
        """End the run if a migration is running, and return whether one is running."""
        status = await read_migration(self._vm.monitor)
        if status in MIGRATION_OVER:
            return False
        self.interrupt(
            RefusedError(
                f"a migration was started during the run (query-migrate: {status})",
                "prefault the guest on the destination, because prefaulting during a migration "
                "would mark every page as dirty",
                code=Code.MIGRATION,
            )
        )
        return True

    async def _follow_migrations(self) -> None:
        """Poll query-migrate, because MIGRATION events require the ``events`` capability."""
        while not await self.migration_started():
            await asyncio.sleep(1)

    async def _follow_events(self, events: EventStream) -> None:
        paused = not self._vm.state.running
        async for event in events:
            if event.name == "STOP":
                paused = True
            elif event.name == "RESET":
                self._tally.warnings[Code.RESET] = (
                    "the guest was reset during the run, so KVM will drop stage-2 tables when the "
                    "firmware runs again"
                )
            elif event.name == "RESUME" and self._own_resumes:
                self._own_resumes -= 1
            elif event.name == "RESUME" and paused and self.prefaulting:
                self.interrupt(resumed_error())
