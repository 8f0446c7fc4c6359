# SPDX-License-Identifier: GPL-2.0-or-later
"""Drive a plan through an agent.

The algorithm, in the order of :meth:`Engine.run`::

    can it work here at all?            checks.refuse_unsupported
    is this a moment to do it?          plan.refuse_unfit
    which memory?                       plan.select
    can the host afford to populate it? checks.refuse_unaffordable
    populate, while the guest runs      Work.populate
    pause the guest                     Engine._pause
    caught in guest mode? let it run on, and pause it again
    read the layout again; if it changed, select and populate what is new
    prefault what is writable           Work.prefault
    resume the guest
    did the tables keep it?             Accounts.verify

A guest that is yet to arrive (:meth:`Engine._receive`) is populated while its RAM is being
loaded, and prefaulted in the window before it starts. Where the time a guest may be kept from
running is limited, the prefaulting is cut into several pauses. Meanwhile :class:`Watch` looks
out for what others do to the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from . import kvm
from .accounts import Accounts
from .agents import Agent, Limits, VcpuThread
from .agents.attach import AttachAgent
from .agents.plugin import PluginAgent, find_control_socket
from .agents.qmp import QmpAgent, offers_command
from .checks import caveats, refuse_unaffordable, refuse_unsupported
from .errors import QemuPrefaultError, RefusedError, UnsupportedError
from .guard import ResumeGuard
from .incoming import refuse_postcopy, take_window
from .monitor import CommandError, read_running, read_stage2, read_status, read_vcpu_stats
from .pagemap import Pagemap
from .plan import (
    MIGRATED_AWAY,
    Policy,
    Target,
    refuse_status,
    refuse_unfit,
    refuse_unless_incoming,
    select,
    without,
)
from .report import Report
from .session import Session
from .watch import Watch
from .work import Progress, Work

LAYOUT_ROUNDS: Final = 4
#: Between two pauses the guest runs this many times as long as a pause may last.
RUN_PER_PAUSE: Final = 2
#: Firmware lives below; a few hundred KiB of it are RAM.
LOW_MEMORY: Final = 1 << 20
#: How often a guest is stopped, and for how many seconds that is tried, until one of its vCPUs
#: is not in guest mode. In the lab a busy nested guest is caught there two times out of three.
GUEST_MODE_TRIES: Final = 50
GUEST_MODE_SECONDS: Final = 5.0
#: Shortest and longest time it runs in between; random, not to keep in step with its timer.
GUEST_MODE_WAIT: Final = (0.002, 0.02)


@dataclass(frozen=True, slots=True)
class _Pause:
    """A guest that is paused: ``resume`` leaves it as it was found, or as was asked for."""

    resume: Callable[[], Awaitable[None]]
    will_resume: bool


class Engine:
    """One prefault run on a :class:`Session`. Make a new one for each run."""

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        cont: bool = False,
        incoming: bool = False,
        agent: str = "auto",
        on_ready: Callable[[], Awaitable[None]] | None = None,
        on_progress: Progress = lambda phase, done, total: None,
    ) -> None:
        self.session = session
        self.policy = policy
        self.cont = cont
        self.incoming = incoming
        self._agent_wanted = agent
        self._socket = find_control_socket(session.process) if agent in ("auto", "plugin") else None
        self._qemu_does_it = False
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._accounts = Accounts()
        # From here on there once an agent is at work:
        self._work: Work
        self._watch: Watch
        self._threads: Sequence[VcpuThread] = ()  # the workers' vCPUs
        self._vcpu_stats: Sequence[kvm.BinaryStats] | None = None  # likewise

    # -- the algorithm -----------------------------------------------------------------

    async def run(self, dry_run: bool = False) -> Report:
        """Do it.

        :raise UnsupportedError, RefusedError: nothing was touched.
        :raise FailedError: something broke; the guest's run state is as it was found.
        """
        session, policy = self.session, self.policy
        await self._find_agent()
        if not policy.populate_only:
            refuse_unsupported(session)
        if self.incoming:
            refuse_unless_incoming(session.machine)
            await refuse_postcopy(session.monitor)
        else:
            refuse_unfit(session.machine, await session.dirty_limit())
        targets = select(session.machine, policy)
        if not policy.populate_only:
            self._accounts.caveats |= caveats(session, policy, targets, self.incoming)
        with Pagemap(session.process) as pagemap:
            absent = refuse_unaffordable(session, targets, pagemap, policy.force)
            if dry_run:
                await self._rehearse(targets, absent, pagemap)
            else:
                await self._act(targets, pagemap)
        return self._accounts.report(session, self._agent_name, dry_run)

    async def _act(self, targets: tuple[Target, ...], pagemap: Pagemap) -> None:
        session, only_populate = self.session, self.policy.populate_only
        self._threads = await session.vcpu_threads(self.policy.vcpus, not only_populate)
        agent = self._make_agent()
        self._work = Work(session, agent, pagemap, self._accounts, self._on_progress)
        self._watch = Watch(session, self._accounts, self._work.end)
        await agent.start()
        async with self._watch.kept(migrations=not self.incoming):
            try:
                if only_populate:
                    await self._work.populate(targets, only=True)
                else:
                    with session.vcpu_stats(self._threads) as self._vcpu_stats:
                        await self._populate_and_prefault(targets)
            finally:
                agent.abort()
                await agent.close()
        if not only_populate:
            self._accounts.verify()
        elif self.cont:
            await self._resume(was_running=session.machine.running)
            if self._watch.reason is not None:
                raise self._watch.reason

    async def _populate_and_prefault(self, targets: tuple[Target, ...]) -> None:
        if self.incoming:
            await self._receive(targets)
            return
        await self._work.populate(targets)
        self._accounts.before = await read_stage2(self.session.monitor)
        if self.policy.max_downtime is not None and await read_running(self.session.monitor):
            await self._prefault_in_turns(targets)
        else:
            await self._prefault_paused(targets)

    async def _prefault_paused(self, targets: tuple[Target, ...]) -> None:
        """Pause the guest and prefault; within bounds, until not all vCPUs are in guest mode.

        A vCPU that runs a nested guest has that guest's MMU loaded. Where its hypervisor uses
        nested paging the ioctl answers EOPNOTSUPP; where it shadows page tables the ioctl
        succeeds, but fills the root of guest mode (``role.guest_mode``, arch/x86/kvm/mmu) and
        not the one the guest itself runs on.
        """
        started = time.monotonic()
        tries = 0
        again = True
        while again and self._watch.reason is None:
            if tries:
                await asyncio.sleep(random.uniform(*GUEST_MODE_WAIT))
            async with self._pause() as pause:
                tries += 1
                may_wait = (
                    pause.will_resume
                    and tries < GUEST_MODE_TRIES
                    and time.monotonic() - started < GUEST_MODE_SECONDS
                )
                caught = await self._all_in_guest_mode()
                if not (caught and may_wait):
                    await self._prefault_until_stable(targets)
                    # As the ioctl tells where KVM's counters do not.
                    unusable = self._work.unusable
                    errors = [unusable.get(worker.index) for worker in self._work.agent.workers]
                    caught = caught or (None not in errors and errno.EOPNOTSUPP in errors)
                again = caught and may_wait
                if not again:
                    self._tell_guest_mode(caught, tries, time.monotonic() - started, pause)
                await pause.resume()

    async def _prefault_until_stable(self, targets: tuple[Target, ...]) -> None:
        """Prefault; if the layout changed meanwhile (hotplug), do what is new as well."""
        done: tuple[Target, ...] = ()
        for _ in range(LAYOUT_ROUNDS):
            fresh = select(await self.session.refresh(), self.policy)
            if fresh == done or self._watch.reason is not None:
                break
            if fresh != targets:
                self._accounts.caveats["layout-changed"] = (
                    "the guest's memory layout changed during the run; what is new was done too"
                )
                await self._work.populate(fresh)
            self._accounts.forget_requests()
            await self._work.prefault(fresh)
            targets = done = fresh
        self._accounts.after = await read_stage2(self.session.monitor)

    async def _prefault_in_turns(self, targets: Sequence[Target], again: bool = False) -> None:
        """By turns, prefault as long as a pause may be and let the guest run.

        :param again: these were begun before.
        """
        limit = self.policy.max_downtime or 0
        started = time.monotonic()
        left = targets
        in_vain = 0
        while left and self._watch.reason is None:
            async with self._pause() as pause:
                caught = await self._all_in_guest_mode()
                in_vain += caught
                give_up = caught and (in_vain == GUEST_MODE_TRIES or not pause.will_resume)
                if give_up or not caught:
                    with self._work.time_limit(self.policy.max_downtime):
                        left = await self._work.prefault(left, again=again)
                    again = True
                    self._accounts.after = await read_stage2(self.session.monitor)
                if give_up:
                    left = ()
                if not left:
                    tries = in_vain + (not caught)
                    self._tell_guest_mode(caught, tries, time.monotonic() - started, pause)
                await pause.resume()
            if left:
                await asyncio.sleep(RUN_PER_PAUSE * limit + random.uniform(*GUEST_MODE_WAIT))

    # -- a guest that is yet to arrive -------------------------------------------------

    async def _receive(self, targets: tuple[Target, ...]) -> None:
        """Populate while RAM is being loaded; prefault before the guest's next instruction."""
        monitor, work, accounts = self.session.monitor, self._work, self._accounts
        left: Sequence[Target] = targets
        begun = False
        accounts.before = await read_stage2(monitor)
        orders = work.agent.death_orders()
        async with take_window(monitor, self.session.process, orders) as arrival:
            populating = asyncio.create_task(work.populate(targets))
            try:
                if self._on_ready is not None:
                    await self._on_ready()
                await arrival.loaded()
                runs = arrival.runs
                with work.time_limit(self.policy.max_downtime):
                    await populating
                    if not runs:
                        self._watch.prefaulting = begun = True
                        left = await work.prefault(targets, trusting=True)
                        self._watch.prefaulting = False
            finally:
                populating.cancel()
                await asyncio.gather(populating, return_exceptions=True)
            # Asked only now: the guest waits for every answer, and hardly any arrives so.
            in_guest_mode = await self._workers_in_guest_mode()
            wanted = arrival.starts_by_itself or self.cont
            if wanted and not runs and self._watch.reason is None:
                await self._start_arrived()
                accounts.count_pause(arrival.loaded_at)
                runs = True
            accounts.after = await read_stage2(monitor)
        if self._watch.reason is None:
            on_other_tables = in_guest_mode - work.unusable.keys()
            if begun and (on_other_tables or not work.usable()):
                left = targets
                accounts.forget_prefaults()
            await self._prefault_rest(targets, left, begun=begun, runs=runs)

    async def _start_arrived(self) -> None:
        monitor = self.session.monitor
        self._watch.expect_resume()
        try:
            await monitor.execute("cont")
        except CommandError:
            refuse_status(await read_status(monitor))  # it came as one that cannot run
            raise

    async def _prefault_rest(
        self, targets: Sequence[Target], left: Sequence[Target], *, begun: bool, runs: bool
    ) -> None:
        """What there was no time for, and what came with the guest.

        Firmware's doings in low memory are known only when devices have been loaded. They
        are a few pages, which are not worth another pause of a guest that runs already.
        """
        if left:
            await self._work.populate(left)
            await self._prefault_in_turns(left, again=begun)
        new = without(select(await self.session.refresh(), self.policy), targets)
        if runs:
            new = tuple(target for target in new if target.gpa >= LOW_MEMORY)
        if new and self._watch.reason is None:
            await self._work.populate(new)
            await self._prefault_in_turns(new)

    # -- guest mode --------------------------------------------------------------------

    async def _all_in_guest_mode(self) -> bool:
        """Choose the vCPUs that are not in guest mode; True if there are none.

        Which they are does not change while the guest is paused.
        """
        self._work.reconsider_vcpus()
        in_guest_mode = await self._workers_in_guest_mode()
        if len(in_guest_mode) == len(self._work.agent.workers):
            return True
        self._work.unusable |= dict.fromkeys(in_guest_mode, errno.EOPNOTSUPP)
        return False

    async def _workers_in_guest_mode(self) -> set[int]:
        """Indexes of the workers whose vCPU runs a nested guest.

        Where KVM does not tell (its counter came with Linux 5.14, ``query-stats`` with QEMU
        7.1), the ioctl will.
        """
        workers = self._work.agent.workers
        if self._vcpu_stats is not None:
            pairs = zip(workers, self._vcpu_stats, strict=True)
            return {worker.index for worker, stats in pairs if stats.read("guest_mode")[0]}
        told = await read_vcpu_stats(self.session.monitor, ("guest_mode",))
        return {
            worker.index
            for worker, thread in zip(workers, self._threads, strict=True)
            if told.get(thread.qom_path, {}).get("guest_mode")
        }

    def _tell_guest_mode(self, caught: bool, tries: int, seconds: float, pause: _Pause) -> None:
        every = "every chosen vCPU" if self.policy.vcpus else "every vCPU"
        notes = self._accounts.caveats
        if not caught:
            if tries > 1:
                notes["guest-mode"] = (
                    f"{_times(tries - 1)} the guest was stopped while {every} ran a nested "
                    "guest; it was let run on and stopped again"
                )
            return
        if not self._work.unusable:  # the ioctl did not mind
            why = "so KVM filled the tables that the nested guest runs on, not the guest's own"
            self._accounts.disown_prefaults()
        else:
            why = "where KVM cannot fill the guest's own tables"
            if set(self._work.unusable.values()) == {errno.EOPNOTSUPP}:
                notes.pop("vcpu-unusable", None)  # which says the same
        if pause.will_resume:
            notes["guest-mode"] = (
                f"stopped {_times(tries)} within {seconds:.1f} s, each time {every} ran a "
                f"nested guest, {why}. The guest runs on: try again when its guests are less busy"
            )
        else:
            notes["guest-mode"] = (
                f"the guest was paused while {every} ran a nested guest, {why}. Use --cont, "
                "which lets it run and stops it at a better moment, or run this while it runs"
            )

    # -- pause and resume --------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _pause(self) -> AsyncIterator[_Pause]:
        """Hold the guest for the block, leave its run state as it was found.

        vCPU ioctls wait for KVM_RUN to return (vcpu->mutex), so the guest has to be stopped.
        What it yields resumes it as early as possible.
        """
        monitor, agent, watch = self.session.monitor, self._work.agent, self._watch
        # Asked anew: populating takes its time, and the operator may have paused the guest.
        was_running = await read_running(monitor)
        stopped_at = 0.0

        async def resume() -> None:
            nonlocal stopped_at
            watch.prefaulting = False
            # An interrupted run leaves the guest to whoever interrupted it.
            if was_running or (self.cont and watch.reason is None):
                await self._resume(was_running)
            if stopped_at:
                self._accounts.count_pause(stopped_at)
                stopped_at = 0.0

        pause = _Pause(resume, was_running or self.cont)
        if not was_running:
            watch.prefaulting = True
            yield pause
            return
        with ResumeGuard(monitor.fileno(), agent.death_orders()):
            stopped_at = time.monotonic()
            try:
                await monitor.execute("stop")
                watch.prefaulting = True
                yield pause
            finally:
                if stopped_at and monitor.alive:  # else the block has resumed it
                    agent.abort()
                    with contextlib.suppress(QemuPrefaultError):
                        await agent.close()
                    await resume()

    async def _resume(self, was_running: bool) -> None:
        """Let the guest run, unless it has migrated away meanwhile: then it runs elsewhere.

        A guest that was found paused is not started under a migration either.
        """
        monitor = self.session.monitor
        status = await read_status(monitor)
        if status in MIGRATED_AWAY:
            self._watch.interrupt(
                RefusedError(
                    f"the guest migrated away during the run (query-status: {status}), and is "
                    "not resumed here",
                    "it lives at the destination; prefault it there",
                    code="migration",
                ),
            )
        elif was_running or not await self._watch.migration_started():
            self._watch.expect_resume()
            await monitor.execute("cont")

    # -- who acts ----------------------------------------------------------------------

    @property
    def _agent_name(self) -> str:
        """The plugin if it is there and not unwanted, else QEMU itself if it can."""
        if self._socket is not None:
            return "plugin"
        return "qmp" if self._qemu_does_it else "attach"

    async def _find_agent(self) -> None:
        if self._socket is None and self._agent_wanted in ("auto", "qmp"):
            session = self.session
            self._qemu_does_it = session.machine.kvm and await offers_command(session.monitor)
        if self._agent_wanted == "qmp" and not self._qemu_does_it:
            raise UnsupportedError(
                f"QEMU (pid {self.session.process.pid}) has no x-kvm-prefault-memory, or does "
                "not use KVM",
                "it takes a QEMU with patches/qemu (make qemu); --agent attach needs none",
                code="no-qmp-command",
            )
        if self._agent_wanted == "plugin" and self._socket is None:
            raise UnsupportedError(
                f"QEMU (pid {self.session.process.pid}) has no qemu-prefault plugin",
                "start it by `qemu-prefault run -- qemu-system-x86_64 …`, or with "
                '-plugin "$(qemu-prefault plugin-path)"; --agent attach needs none',
                code="no-plugin",
            )

    def _make_agent(self) -> Agent:
        limits = Limits()
        if self.policy.chunk_bytes:
            limits = replace(limits, chunk_bytes=self.policy.chunk_bytes)
        if self._qemu_does_it:
            monitor = self.session.monitor
            return QmpAgent(monitor, lambda: self.session.machine.sections, self._threads, limits)
        if self._socket is None:
            return AttachAgent(self.session.process, self._threads, limits)
        return PluginAgent(self.session.process, self._socket, self._threads, limits)

    async def _rehearse(
        self, targets: Sequence[Target], absent: dict[Target, int], pagemap: Pagemap
    ) -> None:
        """Enter in the books what a run would ask for."""
        accounts = self._accounts
        for target in targets:
            tally = accounts.of(target.section)
            private = self.session.backing(target.section).private
            writable = pagemap.sums(target.hva, target.size, private).writable
            tally.requested += target.size if target.touch else writable
            tally.populated += absent[target]
            tally.note = target.why_not
        accounts.before = accounts.after = await read_stage2(self.session.monitor)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
