# SPDX-License-Identifier: GPL-2.0-or-later
"""The window between an incoming guest's RAM being loaded and its next instruction.

A QEMU that waits for a migration or a restore starts the guest by itself when all is loaded,
unless it was started with ``-S``. ``stop`` makes it stay paused instead, and ``cont`` before
that makes it start by itself again (qmp_stop() and qmp_cont(), monitor/qmp-cmds.c: in
``inmigrate`` they only set ``autostart``). So the window can be had without the guest ever
being stopped, and can be given back at any time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from ..agents.base import OrphanCleanup
from ..errors import Code, CommandError, FailedError, MonitorError, QemuPrefaultError, RefusedError
from ..host.procfs import Process
from ..qemu.monitor import EventStream, Monitor
from ..qemu.queries import read_migration, read_status
from .preflight import check_status
from .resume_guard import ResumeGuard

LOAD_SECONDS = 7 * 24 * 3600.0
"""A QEMU that loads from a file may not answer until it is done."""
EVENT_SECONDS = 1.0
POLL_SECONDS = 0.01
"""Between two questions where this QEMU's migrations tell no events."""


class IncomingMigration:
    """A guest whose RAM is being loaded. Obtained from :func:`hold_incoming`.

    :ivar starts_by_itself: whether QEMU was to start it, and we owe it that.
    :ivar loaded_at: ``time.monotonic()`` when its RAM was found loaded.
    :ivar runs: whether it runs by then, by somebody else's doing.
    """

    def __init__(self, monitor: Monitor, starts_by_itself: bool, events: EventStream) -> None:
        self.starts_by_itself = starts_by_itself
        self.loaded_at = 0.0
        self.runs = False
        self._monitor = monitor
        self._events = events
        self._told = False

    async def loaded(self) -> None:
        """Wait until the guest is loaded.

        :raise FailedError: the migration failed or was cancelled.
        :raise RefusedError: it came in a state in which it cannot run.
        """
        with self._monitor.patience(LOAD_SECONDS):
            while not (await self._is_loaded() or await self._is_told()):
                pass
        self.loaded_at = time.monotonic()

    async def _is_loaded(self) -> bool:
        status = await read_status(self._monitor)
        if status != "inmigrate":
            check_status(status)
            self.runs = status == "running"
            return True
        migration = await read_migration(self._monitor)
        if migration in ("failed", "cancelled"):
            raise _failed(f"the incoming migration has ended (query-migrate: {migration})")
        return False

    async def _is_told(self) -> bool:
        """Whether QEMU tells that it is loaded, before it is time to ask again.

        It does so when the guest is in its new run state (process_incoming_migration_bh(),
        migration/migration.c), so there is nothing to ask: the guest waits for every answer.
        """
        with contextlib.suppress(TimeoutError):
            # None: the connection has ended, and the next question tells why.
            while event := await self._events.get(EVENT_SECONDS if self._told else POLL_SECONDS):
                if event.name == "RESUME":
                    self.runs = True
                elif event.data.get("status") == "completed":
                    return True
                elif event.data.get("status") in ("failed", "cancelled"):
                    break
        return False

    async def tell_events(self) -> bool:
        """Have QEMU send MIGRATION events; returns whether that was our doing."""
        self._told = (await _capabilities(self._monitor)).get("events", False)
        if self._told:
            return False
        try:
            await _set_events(self._monitor, True)
        except CommandError:  # too late for this migration
            return False
        self._told = True
        return True


def _failed(cause: str) -> FailedError:
    return FailedError(
        cause,
        "nothing was prefaulted; the guest is where it was, at the source or in its file",
        code=Code.MIGRATION_FAILED,
    )


async def check_no_postcopy(monitor: Monitor) -> None:
    """Raise if the migration may go on after the guest has started.

    :raise RefusedError: each page touched would be asked for from the source, one by one.
    """
    if (await _capabilities(monitor)).get("postcopy-ram"):
        raise RefusedError(
            "this migration may go on as postcopy: missing pages must come from the source first",
            "migrate without the capability postcopy-ram, or prefault when it has completed",
            code=Code.POSTCOPY,
        )


async def _capabilities(monitor: Monitor) -> dict[str, bool]:
    answer = await monitor.execute("query-migrate-capabilities")
    items = answer if isinstance(answer, list) else []
    return {str(item.get("capability")): bool(item.get("state")) for item in items}


async def _set_events(monitor: Monitor, state: bool) -> None:
    await monitor.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": state}]
    )


@contextlib.asynccontextmanager
async def hold_incoming(
    monitor: Monitor, process: Process, cleanup: OrphanCleanup
) -> AsyncIterator[IncomingMigration]:
    """Keep a guest that is being loaded paused when it is, for the block.

    If the block ends early, or we are killed in it, QEMU starts the guest by itself as it
    would have. Who leaves it in order resumes the guest.

    :raise FailedError: the migration failed or was cancelled, of which QEMU ends.
    """
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(monitor.events("MIGRATION", "RESUME"))
        waits = not {"-S", "--S"}.isdisjoint(process.arguments())
        arrival = IncomingMigration(monitor, not waits, events)
        in_order = switched = False
        try:
            switched = await arrival.tell_events()
            if arrival.starts_by_itself:
                stack.enter_context(ResumeGuard(monitor.fileno(), cleanup))
                await monitor.execute("stop")
            yield arrival
            in_order = True
        except MonitorError as error:
            if monitor.alive or arrival.loaded_at:
                raise
            raise _failed("QEMU has ended: the migration failed, or was cancelled") from error
        finally:
            if monitor.alive:
                with contextlib.suppress(QemuPrefaultError):
                    if arrival.starts_by_itself and not in_order:
                        await monitor.execute("cont")
                    if switched:
                        await _set_events(monitor, False)
