# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the steps of a prefault.

:func:`prefault` performs these steps::

    check the guest, KVM and the kernel        preflight.check_supported
    check the guest's state                    preflight.check_vm_state
    choose the memory                          plan.select
    check the host's free memory               preflight.check_headroom
    choose the vCPUs, check QEMU's limits      Selection.choose_threads
    populate while the guest runs              Executor.populate
    pause the guest                            Pauser.pause
    if all vCPUs are in guest mode, resume the guest and pause it again
    read the layout again; if it has changed, choose and populate again
    prefault the writable pages                Executor.prefault
    resume the guest
    compare with KVM's counters                RunTally.verify

:meth:`PrefaultRun.receive` populates an incoming guest while QEMU loads its RAM, and prefaults the
guest before it starts. If the length of a pause is limited, the run prefaults the guest in several
pauses. During the whole run, :class:`InterferenceMonitor` detects whether another client resumes,
resets or migrates the guest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..agents.base import VcpuThread
from ..agents.select import Selection, select_agent
from ..errors import AgentError, Code, CommandError
from ..host.pagemap import Pagemap
from ..host.reservations import Reservation
from ..qemu.kvm_stats import read_stage2
from ..qemu.queries import read_running, read_status
from .executor import Executor, Progress
from .guest_mode import GuestMode
from .incoming import check_no_postcopy, hold_incoming
from .interference import InterferenceMonitor
from .options import Options
from .pause import Pauser
from .plan import Target, select, subtract
from .preflight import (
    check_awaits_incoming,
    check_headroom,
    check_status,
    check_supported,
    check_vm_state,
    find_warnings,
)
from .report import Report
from .tally import RunTally
from .vm import Vm

#: Maximum number of rounds in which a run prefaults the memory if the layout keeps changing.
LAYOUT_ROUNDS: Final = 4
#: Between two pauses, the guest runs for this factor times the maximum pause length.
RUN_PER_PAUSE: Final = 2
#: If this number of pauses in a row prefault nothing, and this time in seconds has passed since the
#: last progress, the run ends.
PAUSES_IN_VAIN: Final = 3
SECONDS_IN_VAIN: Final = 5.0
#: End of the low memory that contains the firmware's areas. These areas are a few hundred KiB.
LOW_MEMORY: Final = 1 << 20

#: A coroutine function that is awaited when QEMU is ready for an incoming migration.
OnReady = Callable[[], Awaitable[None]]


async def prefault(
    vm: Vm,
    options: Options,
    *,
    on_ready: OnReady | None = None,
    on_progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Prefault a guest.

    :param on_ready: A coroutine function that the run awaits when QEMU is ready for an incoming
        migration.
    :param on_progress: A function that the run calls with three arguments. They are the phase, the
        completed bytes in this phase, and the total bytes of this phase.
    :returns: The report of the run.
    :raises UnsupportedError: If this host, kernel or QEMU does not support prefaulting.
    :raises RefusedError: If prefaulting now would harm the guest or the host, or if another client
        migrates the guest during the run.
    :raises FailedError: If a step failed. The guest's run state is the same as before the run.
    """
    selection = await select_agent(options.agent, vm.process, vm.monitor, kvm=vm.state.kvm)
    tally = RunTally()
    if not options.populate_only:
        check_supported(vm)
    if options.incoming:
        check_awaits_incoming(vm.state)
        await check_no_postcopy(vm.monitor)
    else:
        check_vm_state(vm.state, await vm.dirty_limit())
    targets = select(vm.state, options)
    tally.warnings |= find_warnings(options, targets, vm.state) | selection.warnings(vm.process)
    with Pagemap(vm.process) as pagemap, Reservation() as reservation:
        absent = check_headroom(
            vm, targets, pagemap, options.force, None if options.dry_run else reservation
        )
        threads = selection.choose_threads(
            vm.process,
            await vm.vcpu_threads(options.vcpus, not options.populate_only),
            force=options.force,
        )
        if options.dry_run:
            await selection.check_untraced(vm.process, threads)
            await _plan_only(vm, targets, absent, pagemap, tally)
        else:
            await _act(
                vm,
                options,
                selection,
                threads,
                targets,
                pagemap,
                tally,
                reservation,
                on_ready=on_ready,
                on_progress=on_progress,
            )
    return tally.report(vm, selection.name, options.dry_run)


async def _plan_only(
    vm: Vm,
    targets: Sequence[Target],
    absent: dict[Target, int],
    pagemap: Pagemap,
    tally: RunTally,
) -> None:
    """Record in the tally what a run would do."""
    for target in targets:
        section = tally.of(target.section)
        private = vm.backing(target.section).private
        writable = pagemap.sums(target.hva, target.size, private).writable
        section.requested += target.size if target.may_populate else writable
        section.populated += absent[target]
        section.note = target.why_not
    tally.before = tally.after = await read_stage2(vm.monitor)


async def _act(  # noqa: PLR0917
    vm: Vm,
    options: Options,
    selection: Selection,
    threads: Sequence[VcpuThread],
    targets: tuple[Target, ...],
    pagemap: Pagemap,
    tally: RunTally,
    reservation: Reservation,
    *,
    on_ready: OnReady | None,
    on_progress: Progress,
) -> None:
    agent = selection.make(
        vm.process, vm.monitor, lambda: vm.state.sections, threads, options.chunk_bytes
    )
    executor = Executor(
        vm,
        agent,
        pagemap,
        tally,
        on_progress,
        reservation=reservation,
        check_headroom=not options.force,
    )
    interference = InterferenceMonitor(vm, tally, executor.end)
    pauser = Pauser(vm.monitor, agent, interference, tally, cont=options.cont)
    await agent.start()
    async with interference.watched(abort_on_migration=not options.incoming):
        try:
            if options.populate_only:
                await executor.populate(targets, only=True)
            else:
                with vm.vcpu_stats(threads) as stats:
                    guest_mode = GuestMode(
                        vm.monitor, executor, tally, threads, stats, chosen=bool(options.vcpus)
                    )
                    run = PrefaultRun(
                        vm, options, executor, interference, pauser, guest_mode, tally, on_ready
                    )
                    await run.populate_and_prefault(targets)
        finally:
            agent.abort()
            await agent.close()
            tally.warnings |= agent.warnings
    if not options.populate_only:
        tally.verify()
    elif options.cont:
        await pauser.resume(was_running=vm.state.running)
        if interference.reason is not None:
            raise interference.reason


class _PauseProgress:
    """Detects pauses in which nothing is prefaulted.

    :param left: The targets before the first pause.
    """

    def __init__(self, left: Sequence[Target]) -> None:
        self._least = sum(target.size for target in left)
        self._pauses = 0
        self._since = time.monotonic()

    def check(self, left: Sequence[Target]) -> None:
        """Count a pause that left these targets.

        :raises AgentError: If too many pauses prefaulted nothing.
        """
        size = sum(target.size for target in left)
        now = time.monotonic()
        if size < self._least:
            self._least, self._pauses, self._since = size, 0, now
            return
        self._pauses += 1
        if self._pauses >= PAUSES_IN_VAIN and now - self._since > SECONDS_IN_VAIN:
            raise AgentError(
                f"{self._pauses} pauses within {now - self._since:.1f} s prefaulted no memory",
                "use a longer --max-downtime, and run qemu-prefault again",
            )


@dataclass(frozen=True, slots=True)
class PrefaultRun:
    """The prefault of one guest, and the objects that this prefault uses."""

    vm: Vm
    options: Options
    executor: Executor
    interference: InterferenceMonitor
    pauser: Pauser
    guest_mode: GuestMode
    tally: RunTally
    on_ready: OnReady | None

    async def populate_and_prefault(self, targets: tuple[Target, ...]) -> None:
        """Populate the targets, and prefault them in one pause or in several pauses."""
        if self.options.incoming:
            await self.receive(targets)
            return
        await self.executor.populate(targets)
        self.tally.before = await read_stage2(self.vm.monitor)
        if not self.executor.agent.needs_pause:
            await self.prefault_without_pause(targets)
        elif self.options.max_downtime is not None and await read_running(self.vm.monitor):
            await self.prefault_in_several_pauses(targets)
        else:
            await self.prefault_in_one_pause(targets)

    async def prefault_without_pause(self, targets: tuple[Target, ...]) -> None:
        """Prefault the guest on vCPUs that are not the guest's, so that the guest can run."""
        await self.prefault_until_stable(targets)
        wanted = self.options.cont and self.interference.reason is None
        if wanted and not await read_running(self.vm.monitor):
            await self.pauser.resume(was_running=False)

    async def prefault_in_one_pause(self, targets: tuple[Target, ...]) -> None:
        """Pause the guest and prefault it.

        If all vCPUs are in guest mode, resume the guest and try again. :class:`.GuestMode` limits
        the number of attempts.
        """
        guest_mode = self.guest_mode
        started = time.monotonic()
        tries = 0
        again = True
        while again and self.interference.reason is None:
            if tries:
                await guest_mode.let_the_guest_run()
            async with self.pauser.pause() as pause:
                tries += 1
                may_wait = pause.will_resume and guest_mode.worth_another_try(tries, started)
                caught = not await guest_mode.select_vcpus()
                if not (caught and may_wait):
                    await self.prefault_until_stable(targets)
                    caught = caught or guest_mode.refused_every_worker()
                again = caught and may_wait
                if not again:
                    seconds = time.monotonic() - started
                    guest_mode.warn(caught, tries, seconds, pause.will_resume)
                await pause.resume()

    async def prefault_until_stable(self, targets: tuple[Target, ...]) -> None:
        """Prefault the guest, and repeat this while hotplug changes the memory layout.

        The method prefaults the guest at most :data:`LAYOUT_ROUNDS` times.
        """
        done: tuple[Target, ...] = ()
        for _ in range(LAYOUT_ROUNDS):
            fresh = select(await self.vm.refresh(), self.options)
            if fresh == done or self.interference.reason is not None:
                break
            if fresh != targets:
                self.tally.warnings[Code.LAYOUT_CHANGED] = (
                    "the guest's memory layout changed during the run, so the run also prefaulted "
                    "the new memory"
                )
                await self.executor.populate(fresh)
            self.tally.discard_requests()
            await self.executor.prefault(fresh)
            targets = done = fresh
        self.tally.after = await read_stage2(self.vm.monitor)

    async def prefault_in_several_pauses(
        self, targets: Sequence[Target], again: bool = False
    ) -> None:
        """Prefault in pauses of limited length, between which the guest runs.

        :param again: Whether the targets have already been counted as requested.
        """
        guest_mode, executor = self.guest_mode, self.executor
        limit = self.options.max_downtime
        started = time.monotonic()
        left = targets
        in_vain = 0  # pauses in which all vCPUs were in guest mode, and how many in a row
        in_a_row, row_began = 0, started
        progress = _PauseProgress(left)
        while left and self.interference.reason is None:
            async with self.pauser.pause() as pause:
                caught = not await guest_mode.select_vcpus()
                in_vain += caught
                if not caught:
                    in_a_row = 0
                elif not in_a_row:
                    row_began = time.monotonic()
                in_a_row += caught
                worth_it = pause.will_resume and guest_mode.worth_another_try(in_a_row, row_began)
                give_up = caught and not worth_it
                if give_up or not caught:
                    with executor.time_limit(limit):
                        left = await executor.prefault(left, again=again)
                    again = True
                    self.tally.after = await read_stage2(self.vm.monitor)
                    progress.check(left)
                if give_up:
                    left = ()
                if not left:
                    tries = in_vain + (not caught)
                    seconds = time.monotonic() - started
                    guest_mode.warn(caught, tries, seconds, pause.will_resume)
                await pause.resume()
            if left:
                # The pause was short if all vCPUs were in guest mode.
                run_for = 0.0 if caught else RUN_PER_PAUSE * (limit or 0)
                await guest_mode.let_the_guest_run(run_for)

    async def receive(self, targets: tuple[Target, ...]) -> None:
        """Populate an incoming guest while QEMU loads it, and then prefault it."""
        monitor, executor, tally = self.vm.monitor, self.executor, self.tally
        left: Sequence[Target] = targets
        begun = False
        tally.before = await read_stage2(monitor)
        cleanup = executor.agent.orphan_cleanup()
        async with hold_incoming(monitor, self.vm.process, cleanup) as migration:
            populating = asyncio.create_task(executor.populate(targets))
            try:
                if self.on_ready is not None:
                    await self.on_ready()
                await migration.loaded()
                runs = migration.runs
                with executor.time_limit(self.options.max_downtime):
                    await populating
                    if not runs and await executor.agent.hold_vcpus():
                        runs = await read_running(monitor)
                    if not runs:
                        self.interference.prefaulting = begun = True
                        left = await executor.prefault(targets, skip_pagemap=True)
                        self.interference.prefaulting = False
                    await executor.agent.release_vcpus()
            finally:
                populating.cancel()
                await asyncio.gather(populating, return_exceptions=True)
            # Read the vCPUs' modes only after prefaulting: a query would delay the guest, and an
            # incoming guest is rarely in guest mode.
            in_guest_mode = await self.guest_mode.workers()
            wanted = migration.starts_by_itself or self.options.cont
            if wanted and not runs and self.interference.reason is None:
                await self._start_arrived()
                tally.count_pause(migration.loaded_at)
                runs = True
            tally.after = await read_stage2(monitor)
        if self.interference.reason is None:
            on_other_tables = in_guest_mode - executor.unusable.keys()
            if begun and (on_other_tables or not executor.usable()):
                left = targets
                tally.discard_prefaults()
            await self._prefault_rest(targets, left, begun=begun, runs=runs)

    async def _start_arrived(self) -> None:
        monitor = self.vm.monitor
        self.interference.expect_resume()
        try:
            await monitor.execute("cont")
        except CommandError:
            check_status(await read_status(monitor))  # raises the reason if the guest cannot run
            raise

    async def _prefault_rest(
        self, targets: Sequence[Target], left: Sequence[Target], *, begun: bool, runs: bool
    ) -> None:
        """Prefault the targets that remained after the time limit, and new sections.

        The state of the firmware's areas in low memory is known only after QEMU has loaded the
        devices. These areas contain only a few pages. Therefore the run does not pause a running
        guest again for these areas.
        """
        if left:
            await self.executor.populate(left)
            await self.prefault_in_several_pauses(left, again=begun)
        new = subtract(select(await self.vm.refresh(), self.options), targets)
        if runs:
            new = tuple(target for target in new if target.gpa >= LOW_MEMORY)
        if new and self.interference.reason is None:
            await self.executor.populate(new)
            await self.prefault_in_several_pauses(new)
