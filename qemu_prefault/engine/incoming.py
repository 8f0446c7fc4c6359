# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep an incoming guest paused after its RAM is loaded, until it is prefaulted.

If QEMU waits for a migration or a restore, it starts the guest as soon as the guest is loaded. If
QEMU was started with ``-S``, the guest stays paused instead. In the ``inmigrate`` state, the
``stop`` and ``cont`` commands only set ``autostart`` (qmp_stop() and qmp_cont(),
monitor/qmp-cmds.c). After ``stop``, QEMU leaves the loaded guest paused. If ``cont`` follows before
the guest is loaded, QEMU starts the guest automatically again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from ..agents.base import OrphanCleanup
from ..errors import Code, CommandError, FailedError, MonitorError, QemuPrefaultError, RefusedError
from ..host.procfs import Process
from ..qemu.events import EventStream
from ..qemu.monitor import Monitor
from ..qemu.qapi import expect_array, expect_bool, expect_object, expect_str
from ..qemu.queries import read_migration, read_status
from .preflight import check_status
from .resume_guard import ResumeGuard

#: Time limit for each command in seconds. A QEMU that loads a guest from a file may not respond
#: until the guest is loaded.
LOAD_SECONDS = 7 * 24 * 3600.0
#: Seconds between two queries if QEMU sends MIGRATION events.
EVENT_SECONDS = 1.0
#: Seconds between two queries if QEMU sends no MIGRATION events.
POLL_SECONDS = 0.01


class IncomingMigration:
    """An incoming guest, whose RAM QEMU loads from a source or a file.

    :ivar starts_by_itself: Whether QEMU was started without ``-S``. If True, the caller must resume
        the guest.
    :ivar loaded_at: The value of ``time.monotonic()`` when the end of loading was detected.
    :ivar runs: Whether another client had already started the guest at ``loaded_at``.
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

        :raises FailedError: If the migration failed or was cancelled.
        :raises RefusedError: If the loaded guest cannot run in its run state.
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
        """Wait for a MIGRATION event, and return whether it reports the end of loading.

        QEMU sends this event after it has set the guest's new run state
        (process_incoming_migration_bh(), migration/migration.c). Therefore the method sends no
        further query, which would delay the guest.
        """
        with contextlib.suppress(TimeoutError):
            # None means that the connection is closed. The next query raises the error.
            while event := await self._events.get(EVENT_SECONDS if self._told else POLL_SECONDS):
                if event.name == "RESUME":
                    self.runs = True
                elif event.data.get("status") == "completed":
                    return True
                elif event.data.get("status") in ("failed", "cancelled"):
                    break
        return False

    async def tell_events(self) -> bool:
        """Enable MIGRATION events, and return whether this call has changed the setting."""
        self._told = (await _capabilities(self._monitor)).get("events", False)
        if self._told:
            return False
        try:
            await _set_events(self._monitor, True)
        except CommandError:  # the migration has already started
            return False
        self._told = True
        return True


def _failed(cause: str) -> FailedError:
    return FailedError(
        cause,
        "start a new QEMU and repeat the migration or restore. The guest is still on the source or "
        "in the file",
        code=Code.MIGRATION_FAILED,
    )


async def check_no_postcopy(monitor: Monitor) -> None:
    """Raise an error if the migration can switch to postcopy.

    Populating accesses every page. During postcopy, QEMU would request each of these pages from
    the source.

    :raises RefusedError: If the ``postcopy-ram`` capability is set.
    """
    if (await _capabilities(monitor)).get("postcopy-ram"):
        raise RefusedError(
            "this migration may switch to postcopy, in which QEMU fetches pages from the source",
            "migrate without the postcopy-ram capability, or prefault after the migration",
            code=Code.POSTCOPY,
        )


async def _capabilities(monitor: Monitor) -> dict[str, bool]:
    what = "query-migrate-capabilities"
    items = [
        expect_object(item, f"an entry of {what}")
        for item in expect_array(await monitor.execute(what), what)
    ]
    return {
        expect_str(item.get("capability"), f"a capability of {what}"): expect_bool(
            item.get("state"), f"a state of {what}"
        )
        for item in items
    }


async def _set_events(monitor: Monitor, state: bool) -> None:
    await monitor.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": state}]
    )


@contextlib.asynccontextmanager
async def hold_incoming(
    monitor: Monitor, process: Process, cleanup: OrphanCleanup
) -> AsyncIterator[IncomingMigration]:
    """Keep an incoming guest paused after it is loaded, until the caller resumes it.

    If the block exits normally, this function does not resume the guest. If the block raises an
    exception or this process is killed, QEMU starts the guest as if this function had not been
    called.

    :param cleanup: The functions that stop the agent's helpers if this process is killed.
    :raises FailedError: If QEMU exits because the migration failed or was cancelled.
    """
    async with contextlib.AsyncExitStack() as stack:
        events = stack.enter_context(monitor.events("MIGRATION", "RESUME"))
        waits = not {"-S", "--S"}.isdisjoint(process.arguments())
        arrival = IncomingMigration(monitor, not waits, events)
        guard = ResumeGuard(monitor.fileno(), cleanup)
        in_order = switched = False
        try:
            switched = await arrival.tell_events()
            if arrival.starts_by_itself:
                stack.enter_context(guard)
                await stack.enter_async_context(guard.hand_over_on_failure(monitor))
                await monitor.execute("stop")
            yield arrival
            in_order = True
        except MonitorError as error:
            closed = error.code is Code.MONITOR_CLOSED
            if monitor.alive or arrival.loaded_at or not closed:
                raise
            raise _failed(
                "QEMU has exited because the migration failed or was cancelled"
            ) from error
        finally:
            if monitor.alive:
                with contextlib.suppress(QemuPrefaultError):
                    if arrival.starts_by_itself and not in_order:
                        guard.cont_sent = True
                        await monitor.execute("cont")
                    if switched:
                        await _set_events(monitor, False)
