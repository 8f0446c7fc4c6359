# SPDX-License-Identifier: GPL-2.0-or-later
"""Drive a plan through an agent.

The algorithm, in the order of :meth:`Engine.run`::

    is this a moment to do it?          plan.refuse_unfit
    which memory?                       plan.select
    can the host afford to populate it? Engine._check_headroom
    populate, while the guest runs      Engine._populate
    pause the guest                     Engine._pause
    caught in guest mode? let it run on, and pause it again
    read the layout again; if it changed, select and populate what is new
    prefault what is writable           Engine._prefault
    resume the guest
    did the tables keep it?             Engine._verify

A guest that is yet to arrive (:meth:`Engine._receive`) is populated while its RAM is being
loaded, and prefaulted in the window before it starts. Where the time a guest may be kept from
running is limited, the prefaulting is cut into several pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from . import kvm
from .agents import Agent, BatchResult, Kind, Limits, Outcome, Range, VcpuThread, Worker
from .agents.attach import AttachAgent
from .agents.plugin import PluginAgent, find_control_socket
from .errors import FailedError, QemuPrefaultError, RefusedError, UnsupportedError
from .guard import ResumeGuard
from .incoming import refuse_postcopy, take_window
from .layout import Section, firmware_ahead, huge_alignment
from .monitor import (
    CommandError,
    EventStream,
    read_migration,
    read_running,
    read_stage2,
    read_status,
    read_vcpu_stats,
)
from .pagemap import Pagemap
from .plan import (
    HUGE,
    MIGRATED_AWAY,
    MIGRATION_OVER,
    PAGE,
    Policy,
    Populate,
    Target,
    refuse_status,
    refuse_unfit,
    refuse_unless_incoming,
    select,
    stripe_by_node,
    without,
)
from .report import Bytes, Caveat, Report, Seconds, SectionReport, Stage2, size
from .session import Session

Progress = Callable[[str, int, int], None]
"""Called with the phase ("populate", "prefault"), bytes done and bytes in all."""

LAYOUT_ROUNDS: Final = 4
#: Errors that are the vCPU's, not the range's: another vCPU may succeed.
VCPU_ERRORS: Final = (kvm.STUCK, errno.EOPNOTSUPP)
#: Between two pauses the guest runs this many times as long as a pause may last.
RUN_PER_PAUSE: Final = 2
#: Firmware lives below; a few hundred KiB of it are RAM.
LOW_MEMORY: Final = 1 << 20
NO_VCPU: Final = "prefault: no vCPU could be used"
#: How often a guest is stopped, and for how many seconds that is tried, until one of its vCPUs
#: is not in guest mode. In the lab a busy nested guest is caught there two times out of three.
GUEST_MODE_TRIES: Final = 50
GUEST_MODE_SECONDS: Final = 5.0
#: Shortest and longest time it runs in between; random, not to keep in step with its timer.
GUEST_MODE_WAIT: Final = (0.002, 0.02)


@dataclass(slots=True)
class _Tally:
    """What was done to one section so far, in bytes."""

    requested: int = 0
    populated: int = 0
    prefaulted: int = 0
    accounted: int = 0
    note: str | None = None


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
        self._socket = None if agent == "attach" else find_control_socket(session.process)
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._tallies: dict[str, _Tally] = {}
        self._caveats: dict[str, str] = {}
        self._populate_seconds = 0.0
        self._prefault_seconds = 0.0
        self._paused_seconds = 0.0
        self._longest_pause = 0.0
        self._time_is_up = False
        self._unusable: dict[int, int] = {}  # worker index -> errno
        self._interrupted: QemuPrefaultError | None = None
        self._prefaulting = False
        self._qom_paths: tuple[str, ...] = ()  # of the workers' vCPUs
        self._vcpu_stats: list[kvm.BinaryStats] | None = None  # likewise
        self._own_resumes = 0  # whose events are yet to come
        self._all_writable: set[Target] = set()  # when they had been populated
        self._before: Stage2 | None = None
        self._after: Stage2 | None = None

    # -- the algorithm -----------------------------------------------------------------

    async def run(self, dry_run: bool = False) -> Report:
        """Do it.

        :raise UnsupportedError, RefusedError: nothing was touched.
        :raise FailedError: something broke; the guest's run state is as it was found.
        """
        started = time.monotonic()
        session = self.session
        self._refuse_unsupported()
        if self.incoming:
            refuse_unless_incoming(session.machine)
            await refuse_postcopy(session.monitor)
        else:
            refuse_unfit(session.machine, await session.dirty_limit())
        targets = select(session.machine, self.policy)
        if not self.policy.populate_only:
            self._warn(targets)
        with Pagemap(session.process) as pagemap:
            absent = self._check_headroom(targets, pagemap)
            if dry_run:
                return await self._dry_report(targets, absent, pagemap, started)
            await self._act(targets, pagemap)
        return self._report(started)

    async def _act(self, targets: tuple[Target, ...], pagemap: Pagemap) -> None:
        session = self.session
        threads = await session.vcpu_threads(self.policy.vcpus, not self.policy.populate_only)
        self._qom_paths = tuple(thread.qom_path for thread in threads)
        agent = self._make_agent(threads)
        await agent.start()
        async with self._watch(agent):
            try:
                if self.policy.populate_only:
                    await self._populate(agent, targets, pagemap)
                else:
                    with session.vcpu_stats(threads) as self._vcpu_stats:
                        await self._populate_and_prefault(agent, targets, pagemap)
            finally:
                agent.abort()
                await agent.close()
        if self.policy.populate_only:
            if self.cont and self._interrupted is None:
                await self._resume(agent, was_running=session.machine.running)
                if self._interrupted is not None:
                    raise self._interrupted
        elif self._interrupted is None:
            self._verify()

    @property
    def agent_name(self) -> str:
        """Who acts inside QEMU: the plugin if it is there and not unwanted."""
        return "attach" if self._socket is None else "plugin"

    def _make_agent(self, threads: Sequence[VcpuThread]) -> Agent:
        limits = Limits()
        if self.policy.chunk_bytes:
            limits = replace(limits, chunk_bytes=self.policy.chunk_bytes)
        process = self.session.process
        if self._socket is None:
            return AttachAgent(process, threads, limits)
        return PluginAgent(process, self._socket, threads, limits)

    async def _populate_and_prefault(
        self, agent: Agent, targets: tuple[Target, ...], pagemap: Pagemap
    ) -> None:
        if self.incoming:
            await self._receive(agent, targets, pagemap)
        else:
            await self._populate(agent, targets, pagemap)
            await self._prefault_paused(agent, targets, pagemap)

    async def _prefault_paused(
        self, agent: Agent, targets: tuple[Target, ...], pagemap: Pagemap
    ) -> None:
        """Pause the guest and prefault; within bounds, until not all vCPUs are in guest mode.

        A vCPU that runs a nested guest has that guest's MMU loaded. Where its hypervisor uses
        nested paging the ioctl answers EOPNOTSUPP; where it shadows page tables the ioctl
        succeeds, but fills the root of guest mode (``role.guest_mode``, arch/x86/kvm/mmu) and
        not the one the guest itself runs on.
        """
        if self.policy.max_downtime is not None and await read_running(self.session.monitor):
            await self._prefault_in_turns(agent, targets, pagemap)
            return
        self._before = await read_stage2(self.session.monitor)
        started = time.monotonic()
        tries = 0
        again = True
        while again and self._interrupted is None:
            if tries:
                await asyncio.sleep(random.uniform(*GUEST_MODE_WAIT))
            async with self._pause(agent) as pause:
                tries += 1
                may_wait = (
                    pause.will_resume
                    and tries < GUEST_MODE_TRIES
                    and time.monotonic() - started < GUEST_MODE_SECONDS
                )
                caught = await self._all_in_guest_mode(agent)
                if not (caught and may_wait):
                    await self._prefault_until_stable(agent, targets, pagemap)
                    # As the ioctl tells where KVM's counters do not.
                    errors = [self._unusable.get(worker.index) for worker in agent.workers]
                    caught = caught or (None not in errors and errno.EOPNOTSUPP in errors)
                again = caught and may_wait
                if not again:
                    self._tell_guest_mode(caught, tries, time.monotonic() - started, pause)
                await pause.resume()

    async def _prefault_in_turns(
        self, agent: Agent, targets: Sequence[Target], pagemap: Pagemap, again: bool = False
    ) -> None:
        """By turns, prefault as long as a pause may be and let the guest run.

        :param again: these were begun before.
        """
        limit = self.policy.max_downtime or 0
        started = time.monotonic()
        self._before = self._before or await read_stage2(self.session.monitor)
        left = targets
        in_vain = 0
        while left and self._interrupted is None:
            async with self._pause(agent) as pause:
                caught = await self._all_in_guest_mode(agent)
                in_vain += caught
                give_up = caught and (in_vain == GUEST_MODE_TRIES or not pause.will_resume)
                if give_up or not caught:
                    with self._time_limit(agent):
                        left = await self._prefault(agent, left, pagemap, again)
                    again = True
                    self._after = await read_stage2(self.session.monitor)
                if give_up:
                    left = ()
                if not left:
                    self._tell_guest_mode(
                        caught, in_vain + (not caught), time.monotonic() - started, pause
                    )
                await pause.resume()
            if left:
                await asyncio.sleep(RUN_PER_PAUSE * limit + random.uniform(*GUEST_MODE_WAIT))

    async def _all_in_guest_mode(self, agent: Agent) -> bool:
        """Choose the vCPUs that are not in guest mode; True if there are none.

        Which they are does not change while the guest is paused.
        """
        self._unusable.clear()
        self._caveats.pop("vcpu-unusable", None)
        for tally in self._tallies.values():
            if tally.note == NO_VCPU:
                tally.note = None
        in_guest_mode = await self._workers_in_guest_mode(agent)
        if len(in_guest_mode) == len(agent.workers):
            return True
        self._unusable = dict.fromkeys(in_guest_mode, errno.EOPNOTSUPP)
        return False

    async def _workers_in_guest_mode(self, agent: Agent) -> set[int]:
        """Indexes of the workers whose vCPU runs a nested guest.

        Where KVM does not tell (its counter came with Linux 5.14, ``query-stats`` with QEMU
        7.1), the ioctl will.
        """
        if self._vcpu_stats is not None:
            pairs = zip(agent.workers, self._vcpu_stats, strict=True)
            return {worker.index for worker, stats in pairs if stats.read("guest_mode")}
        stats = await read_vcpu_stats(self.session.monitor, ("guest_mode",))
        return {
            worker.index
            for worker, path in zip(agent.workers, self._qom_paths, strict=True)
            if stats.get(path, {}).get("guest_mode")
        }

    def _tell_guest_mode(self, caught: bool, tries: int, seconds: float, pause: _Pause) -> None:
        every = "every chosen vCPU" if self.policy.vcpus else "every vCPU"
        if not caught:
            if tries > 1:
                self._caveats["guest-mode"] = (
                    f"{_times(tries - 1)} the guest was stopped while {every} ran a nested "
                    "guest; it was let run on and stopped again"
                )
            return
        if not self._unusable:  # the ioctl did not mind
            why = "so KVM filled the tables that the nested guest runs on, not the guest's own"
            for tally in self._tallies.values():
                tally.accounted = 0
        else:
            why = "where KVM cannot fill the guest's own tables"
            if set(self._unusable.values()) == {errno.EOPNOTSUPP}:
                self._caveats.pop("vcpu-unusable", None)  # which says the same
        if pause.will_resume:
            self._caveats["guest-mode"] = (
                f"stopped {_times(tries)} within {seconds:.1f} s, each time {every} ran a "
                f"nested guest, {why}. The guest runs on: try again when its guests are less busy"
            )
        else:
            self._caveats["guest-mode"] = (
                f"the guest was paused while {every} ran a nested guest, {why}. Use --cont, "
                "which lets it run and stops it at a better moment, or run this while it runs"
            )

    async def _prefault_until_stable(
        self, agent: Agent, targets: tuple[Target, ...], pagemap: Pagemap
    ) -> None:
        """Prefault; if the layout changed meanwhile (hotplug), do what is new as well."""
        session = self.session
        done: tuple[Target, ...] = ()
        for _ in range(LAYOUT_ROUNDS):
            fresh = select(await session.refresh(), self.policy)
            if fresh == done or self._interrupted:
                break
            if fresh != targets:
                self._caveats["layout-changed"] = (
                    "the guest's memory layout changed during the run; what is new was done too"
                )
                await self._populate(agent, fresh, pagemap)
            for tally in self._tallies.values():
                tally.requested = tally.prefaulted = tally.accounted = 0
            await self._prefault(agent, fresh, pagemap)
            targets = done = fresh
        self._after = await read_stage2(session.monitor)

    async def _receive(self, agent: Agent, targets: tuple[Target, ...], pagemap: Pagemap) -> None:
        """Populate while RAM is being loaded; prefault before the guest's next instruction."""
        monitor = self.session.monitor
        left: Sequence[Target] = targets
        begun = False
        self._before = await read_stage2(monitor)
        async with take_window(monitor, self.session.process, agent.death_orders()) as arrival:
            populating = asyncio.create_task(self._populate(agent, targets, pagemap))
            try:
                if self._on_ready is not None:
                    await self._on_ready()
                await arrival.loaded()
                runs = arrival.runs
                with self._time_limit(agent):
                    await populating
                    if not runs:
                        self._prefaulting = begun = True
                        # Nobody has run who could have given any of it back since then.
                        seen = frozenset(self._all_writable)
                        left = await self._prefault(agent, targets, pagemap, seen=seen)
                        self._prefaulting = False
            finally:
                populating.cancel()
                await asyncio.gather(populating, return_exceptions=True)
            wanted = arrival.starts_by_itself or self.cont
            if wanted and not runs and self._interrupted is None:
                in_guest_mode = await self._start_arrived(agent)
                self._count_pause(arrival.loaded_at)
                runs = True
            else:
                in_guest_mode = await self._workers_in_guest_mode(agent)
            self._after = await read_stage2(monitor)
        if self._interrupted is None:
            misled = in_guest_mode - self._unusable.keys()
            if begun and (misled or not self._usable(agent.workers)):
                left = targets
                for tally in self._tallies.values():
                    tally.prefaulted = tally.accounted = 0
            await self._prefault_rest(agent, targets, left, pagemap, begun=begun, runs=runs)

    async def _start_arrived(self, agent: Agent) -> set[int]:
        """Start it; return who was in guest mode until then, see :meth:`_prefault_paused`.

        Hardly any guest arrives in guest mode, so it is not asked before the work.
        """
        monitor = self.session.monitor
        in_guest_mode = await self._workers_in_guest_mode(agent)
        self._own_resumes += 1
        try:
            await monitor.execute("cont")
        except CommandError:
            refuse_status(await read_status(monitor))  # it came as one that cannot run
            raise
        return in_guest_mode

    async def _prefault_rest(
        self,
        agent: Agent,
        targets: Sequence[Target],
        left: Sequence[Target],
        pagemap: Pagemap,
        *,
        begun: bool,
        runs: bool,
    ) -> None:
        """What there was no time for, and what came with the guest.

        Firmware's doings in low memory are known only when devices have been loaded. They
        are a few pages, which are not worth another pause of a guest that runs already.
        """
        if left:
            await self._populate(agent, left, pagemap)
            await self._prefault_in_turns(agent, left, pagemap, again=begun)
        new = without(select(await self.session.refresh(), self.policy), targets)
        if runs:
            new = tuple(target for target in new if target.gpa >= LOW_MEMORY)
        if new and self._interrupted is None:
            await self._populate(agent, new, pagemap)
            await self._prefault_in_turns(agent, new, pagemap)

    # -- may we, can we ----------------------------------------------------------------

    def _refuse_unsupported(self) -> None:
        if self._agent_wanted == "plugin" and self._socket is None:
            raise UnsupportedError(
                f"QEMU (pid {self.session.process.pid}) has no qemu-prefault plugin",
                "start it by `qemu-prefault run -- qemu-system-x86_64 …`, or with "
                '-plugin "$(qemu-prefault plugin-path)"; --agent attach needs none',
                code="no-plugin",
            )
        if self.policy.populate_only:
            return
        if not self.session.machine.kvm:
            raise UnsupportedError(
                "this guest does not run under KVM",
                "there are no stage-2 tables to fill; start QEMU with -accel kvm. "
                "--populate-only still spares the guest the host's faults.",
                code="not-kvm",
            )
        capability = self.session.capability
        if capability.available is False:
            raise UnsupportedError(capability.reason, capability.remedy, code="no-capability")

    def _check_headroom(self, targets: Sequence[Target], pagemap: Pagemap) -> dict[Target, int]:
        """Bytes each target would newly allocate; refuse if the host cannot give them.

        :raise RefusedError: with what is needed, what there is, and which limit it is.
        """
        needs: dict[int, int] = {}
        absent = {}
        for target in targets:
            backing = self.session.backing(target.section)
            mapped = pagemap.sums(target.hva, target.size, backing.private)
            elsewhere = max(0, target.section.size - self.session.allocated(target.section))
            absent[target] = min(target.size - mapped.present, elsewhere) if target.touch else 0
            page_size = target.section.page_size
            needs[page_size] = needs.get(page_size, 0) + absent[target]
        if self.policy.force:
            return absent
        process = self.session.process
        for page_size, needed in needs.items():
            limits = (
                process.memory_headroom() if page_size == PAGE else process.hugetlb_free(page_size)
            )
            for limit in limits:
                if needed > limit.available:
                    raise RefusedError(
                        f"populating needs {size(needed)}, but {limit.name} has only "
                        f"{size(limit.available)} to give ({limit.detail})",
                        "free memory, raise the limit, use --populate resident or --max-bytes; "
                        "--force goes ahead all the same",
                        code="no-memory",
                    )
        return absent

    def _warn(self, targets: Sequence[Target]) -> None:
        """Collect what the operator should know about this host and this guest."""
        caveats = self._caveats
        machine = self.session.machine
        if firmware_ahead(machine.ranges) and not self.incoming:
            caveats["firmware-ahead"] = (
                "the guest's firmware has yet to run: it makes QEMU delete and re-create the slot "
                "of low RAM, and each time KVM drops every stage-2 table. Run this after boot"
            )
        crooked = [
            t.section.name
            for t in targets
            if t.section.size >= HUGE and not huge_alignment(t.section, HUGE)
        ]
        if crooked:
            caveats["never-huge"] = (
                f"{', '.join(dict.fromkeys(crooked))}: guest and host addresses differ modulo "
                "2 MiB, so KVM can never use huge pages there (memory-backend-file,align=2M)"
            )
        if kvm.parameter("kvm_intel", "eptad") == "N":
            caveats["no-ept-ad"] = (
                "this CPU's EPT has no accessed/dirty bits: a prefaulted page still takes one "
                "exit at its first access"
            )
        if kvm.parameter("kvm", "nx_huge_pages") == "Y":
            caveats["nx-huge-pages"] = (
                "kvm.nx_huge_pages is on: huge pages are mapped non-executable, and the guest's "
                "first execution from each still faults"
            )
        if any(t.why_not for t in targets):
            reasons = dict.fromkeys(f"{t.section.name}: {t.why_not}" for t in targets if t.why_not)
            if self.policy.populate is Populate.AUTO:
                caveats["resident-only"] = (
                    f"only present pages were prefaulted ({'; '.join(reasons)})"
                )

    # -- populate ----------------------------------------------------------------------

    async def _populate(self, agent: Agent, targets: Sequence[Target], pagemap: Pagemap) -> None:
        """Make every page that may be touched present and writable in QEMU's own tables.

        The ioctl is a read fault: over untouched memory it would map the zero page
        read-only, and each of the guest's writes would fault all the same, at 4 KiB.
        """
        work = []
        present_before = {}
        for target in targets:
            if not target.touch:
                continue
            backing = self.session.backing(target.section)
            sums = pagemap.sums(target.hva, target.size, backing.private)
            present_before[target] = sums.present
            if backing.kind == "hugetlb":  # pagemap does not tell writable from read-only there
                gaps: Iterable[tuple[int, int]] = [(target.hva, target.size)]
            else:
                gaps = pagemap.unwritable(target.hva, target.size, backing.private)
            for start, length in gaps:
                work.append((target.section.node, Range(Kind.POPULATE, start, length)))
        total = sum(item.size for _, item in work)
        outcomes, _ = await self._run_all(agent, work, "populate", total)
        for target, before in present_before.items():
            backing = self.session.backing(target.section)
            after = pagemap.sums(target.hva, target.size, backing.private)
            self._tally(target.section).populated += max(0, after.present - before)
            if after.writable == target.size:
                self._all_writable.add(target)
            if self.policy.populate_only:
                self._tally(target.section).requested += target.size
                self._tally(target.section).accounted += after.writable
            error = next((o.error for o in outcomes if o.error and _overlaps(o.range, target)), 0)
            if error and error != kvm.ABORTED:
                self._tally(target.section).note = f"populate: {kvm.describe_errno(error)}"

    # -- prefault ----------------------------------------------------------------------

    async def _prefault(
        self,
        agent: Agent,
        targets: Sequence[Target],
        pagemap: Pagemap,
        again: bool = False,
        seen: frozenset[Target] = frozenset(),
    ) -> list[Target]:
        """Prefault the pages that are writable now; the rest would be mapped read-only.

        :param again: these were begun before: what was requested of them is counted already.
        :param seen: these are known to be writable, all of them: do not look again.
        :return: what there was no time for; see :meth:`_time_limit`.
        """
        total = sum(target.size for target in targets)
        window: list[tuple[int | None, Range]] = []
        owners: list[tuple[Range, Target]] = []
        left: list[Target] = []
        finished = 0

        def owner_of(item: Range) -> Target:
            return next(
                target
                for part, target in owners
                if part.start <= item.start < part.start + part.size
            )

        async def flush() -> None:
            nonlocal finished
            outcomes, undone = await self._run_all(agent, window, "prefault", total, finished)
            for outcome in outcomes:
                tally = self._tally(owner_of(outcome.range).section)
                tally.prefaulted += outcome.done
                tally.accounted += outcome.done
                finished += outcome.done
                # Where a vCPU is the matter, others have taken over, or the caveat tells.
                if outcome.error and outcome.error not in (kvm.ABORTED, *VCPU_ERRORS):
                    tally.note = f"prefault: {kvm.describe_errno(outcome.error)}"
            for item in undone:
                left.append(replace(owner_of(item), gpa=item.start, size=item.size))
            window.clear()
            owners.clear()

        limit = agent.ranges_per_batch // 2  # stripes cut ranges in two
        for target in targets:
            backing = self.session.backing(target.section)
            tally = self._tally(target.section)
            if self._time_is_up:  # maybe even to populate it
                left.append(target)
                if not again:
                    sums = pagemap.sums(target.hva, target.size, backing.private)
                    tally.requested += target.size if target.touch else sums.writable
                continue
            writable = 0
            regions: Iterable[tuple[int, int]] = (
                [(target.hva, target.size)]
                if target in seen
                else pagemap.writable(target.hva, target.size, backing.private)
            )
            for start, length in regions:
                item = Range(Kind.STAGE2, target.gpa + (start - target.hva), length)
                window.append((target.section.node, item))
                owners.append((item, target))
                writable += length
                if len(window) >= limit:
                    await flush()
            if not again:
                tally.requested += target.size if target.touch else writable
            if target.touch and writable < target.size and tally.note is None:
                tally.note = f"{size(target.size - writable)} could not be made writable"
            if not target.touch:
                tally.note = target.why_not
        if window:
            await flush()
        if not self._usable(agent.workers):
            for tally in self._tallies.values():
                if tally.accounted < tally.requested:
                    tally.note = tally.note or NO_VCPU
        return left

    async def _run_all(
        self,
        agent: Agent,
        work: Sequence[tuple[int | None, Range]],
        phase: str,
        total: int,
        base: int = 0,
    ) -> tuple[list[Outcome], list[Range]]:
        """Run ranges on all usable workers; what a stuck vCPU leaves, another one takes.

        :return: outcomes, and what there was no time for.
        """
        outcomes: list[Outcome] = []
        todo = list(work)
        while todo and self._interrupted is None and not self._time_is_up:
            workers = self._usable(agent.workers)
            if not workers:
                break
            shares = stripe_by_node(todo, workers)
            batch = {
                index: share[: agent.ranges_per_batch] for index, share in shares.items() if share
            }
            done = base + sum(o.done for o in outcomes)

            def on_progress(more: int, done: int = done) -> None:
                self._on_progress(phase, done + more, total)

            result = await agent.run(batch, on_progress)
            self._count_seconds(phase, result)
            node_of = {worker.index: worker.node for worker in workers}
            todo = [
                (node_of[index], item)
                for index, share in shares.items()
                for item in share[agent.ranges_per_batch :]
            ]
            for index, items in result.outcomes.items():
                for outcome in items:
                    vcpu_failed = outcome.range.kind is Kind.STAGE2 and outcome.error in VCPU_ERRORS
                    if vcpu_failed:
                        self._unusable[index] = outcome.error
                    outcomes.append(outcome)
                    cut_short = self._time_is_up and outcome.error == kvm.ABORTED
                    # What this vCPU left, or did not come to, another one takes.
                    goes_on = vcpu_failed or cut_short or not outcome.error
                    if outcome.left is not None and goes_on:
                        todo.append((node_of[index], outcome.left))
        return outcomes, [item for _, item in todo] if self._time_is_up else []

    @contextlib.contextmanager
    def _time_limit(self, agent: Agent) -> Iterator[None]:
        """End the work in the block, after the chunks in hand, when a pause has lasted enough."""
        limit = self.policy.max_downtime
        loop = asyncio.get_running_loop()
        timer = None if limit is None else loop.call_later(limit, self._end_turn, agent)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._time_is_up = False

    def _end_turn(self, agent: Agent) -> None:
        self._time_is_up = True
        agent.interrupt()

    def _usable(self, workers: Sequence[Worker]) -> list[Worker]:
        usable = [worker for worker in workers if worker.index not in self._unusable]
        if self._unusable:
            names = ", ".join(
                f"vCPU {index} ({kvm.describe_errno(error)})"
                for index, error in sorted(self._unusable.items())
            )
            self._caveats["vcpu-unusable"] = f"not used: {names}" + (
                "" if usable else "; let the guest run for a moment (cont), then run this again"
            )
        return usable

    def _count_seconds(self, phase: str, result: BatchResult) -> None:
        if phase == "populate":
            self._populate_seconds += result.seconds
        else:
            self._prefault_seconds += result.seconds

    # -- pause and watch ---------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _pause(self, agent: Agent) -> AsyncIterator[_Pause]:
        """Hold the guest for the block, leave its run state as it was found.

        vCPU ioctls wait for KVM_RUN to return (vcpu->mutex), so the guest has to be stopped.
        What it yields resumes it as early as possible.
        """
        monitor = self.session.monitor
        # Asked anew: populating takes its time, and the operator may have paused the guest.
        was_running = await read_running(monitor)
        stopped_at = 0.0

        async def resume() -> None:
            nonlocal stopped_at
            self._prefaulting = False
            # An interrupted run leaves the guest to whoever interrupted it.
            if was_running or (self.cont and self._interrupted is None):
                await self._resume(agent, was_running)
            if stopped_at:
                self._count_pause(stopped_at)
                stopped_at = 0.0

        pause = _Pause(resume, was_running or self.cont)
        if not was_running:
            self._prefaulting = True
            yield pause
            return
        guard = ResumeGuard(monitor.fileno(), agent.death_orders())
        with guard:
            stopped_at = time.monotonic()
            try:
                await monitor.execute("stop")
                self._prefaulting = True
                yield pause
            finally:
                if stopped_at and monitor.alive:  # else the block has resumed it
                    agent.abort()
                    with contextlib.suppress(QemuPrefaultError):
                        await agent.close()
                    await resume()

    async def _resume(self, agent: Agent, was_running: bool) -> None:
        """Let the guest run, unless it has migrated away meanwhile: then it runs elsewhere.

        A guest that was found paused is not started under a migration either.
        """
        monitor = self.session.monitor
        status = await read_status(monitor)
        if status in MIGRATED_AWAY:
            self._interrupt(
                agent,
                RefusedError(
                    f"the guest migrated away during the run (query-status: {status}), and is "
                    "not resumed here",
                    "it lives at the destination; prefault it there",
                    code="migration",
                ),
            )
        elif was_running or not await self._refuse_migration(agent):
            self._own_resumes += 1
            await monitor.execute("cont")

    def _count_pause(self, began: float) -> None:
        seconds = time.monotonic() - began
        self._paused_seconds += seconds
        self._longest_pause = max(self._longest_pause, seconds)

    @contextlib.asynccontextmanager
    async def _watch(self, agent: Agent) -> AsyncIterator[None]:
        """End the run, with the reason, when somebody else changes what it rests on."""
        monitor = self.session.monitor
        with monitor.events("RESUME", "STOP", "RESET", "SHUTDOWN", "MIGRATION") as events:
            tasks = [asyncio.create_task(self._follow_events(events, agent))]
            if not self.incoming:
                tasks.append(asyncio.create_task(self._follow_migration(agent)))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self._interrupted is not None:
            raise self._interrupted

    async def _follow_events(self, events: EventStream, agent: Agent) -> None:
        paused = not self.session.machine.running
        async for event in events:
            if event.name == "STOP":
                paused = True
            elif event.name == "RESET":
                self._caveats["reset"] = (
                    "the guest was reset during the run: firmware will run again"
                )
            elif event.name == "RESUME" and self._own_resumes:
                self._own_resumes -= 1
            elif event.name == "RESUME" and paused and self._prefaulting:
                self._interrupt(
                    agent,
                    FailedError(
                        "somebody resumed the guest while it was being prefaulted",
                        "what was done stays; run this again for the rest",
                        code="resumed",
                    ),
                )

    async def _follow_migration(self, agent: Agent) -> None:
        """MIGRATION events come only if the capability is set, so ask."""
        while not await self._refuse_migration(agent):
            await asyncio.sleep(1)

    async def _refuse_migration(self, agent: Agent) -> bool:
        """End the run if a migration was started; returns whether it was."""
        status = await read_migration(self.session.monitor)
        if status in MIGRATION_OVER:
            return False
        self._interrupt(
            agent,
            RefusedError(
                f"a migration was started during the run (query-migrate: {status})",
                "the run was ended, so that it does not dirty every page; prefault at the "
                "destination",
                code="migration",
            ),
        )
        return True

    def _interrupt(self, agent: Agent, reason: QemuPrefaultError) -> None:
        if self._interrupted is None:
            self._interrupted = reason
            agent.abort()

    # -- what it came to ---------------------------------------------------------------

    def _verify(self) -> None:
        """Believe counters: the tables must hold what the ioctl said it mapped."""
        if self._after is None:
            self._caveats["no-counters"] = (
                "this QEMU or kernel has no query-stats: only the ioctl's word stands for it"
            )
            return
        done = sum(tally.prefaulted for tally in self._tallies.values())
        missing = done - self._after.bytes
        if missing > 0:
            self._caveats["zapped"] = (
                f"{size(missing)} were dropped from the stage-2 tables again: a memory slot was "
                "deleted meanwhile (firmware, reset, hot-unplug), or the host reclaimed memory"
            )
            for tally in self._tallies.values():
                lost = min(missing, tally.prefaulted)
                tally.prefaulted -= lost
                tally.accounted -= lost
                missing -= lost

    def _tally(self, section: Section) -> _Tally:
        return self._tallies.setdefault(f"{section.gpa:#x}", _Tally())

    async def _dry_report(
        self,
        targets: Sequence[Target],
        absent: dict[Target, int],
        pagemap: Pagemap,
        started: float,
    ) -> Report:
        for target in targets:
            tally = self._tally(target.section)
            backing = self.session.backing(target.section)
            writable = pagemap.sums(target.hva, target.size, backing.private).writable
            tally.requested += target.size if target.touch else writable
            tally.populated += absent[target]
            tally.note = target.why_not
        self._before = self._after = await read_stage2(self.session.monitor)
        return replace(self._report(started), dry_run=True)

    def _report(self, started: float) -> Report:
        session = self.session
        sections = []
        for section in session.machine.sections:
            if section.skip_code in ("rom", "rom-device") or not section.hva:
                continue
            tally = self._tallies.get(f"{section.gpa:#x}", _Tally())
            sections.append(
                SectionReport(
                    section.name,
                    section.gpa,
                    section.size,
                    section.hva,
                    str(session.backing(section)),
                    tally.populated,
                    tally.prefaulted,
                    section.skipped or tally.note,
                )
            )
        tallies = self._tallies.values()
        requested = sum(t.requested for t in tallies)
        return Report(
            agent=self.agent_name,
            pid=session.process.pid,
            qemu_version=session.machine.version,
            qemu_status=session.machine.status,
            kernel_release=os.uname().release,
            pre_fault_memory=session.capability.available,
            sections=tuple(sections),
            bytes=Bytes(
                requested,
                sum(t.populated for t in tallies),
                sum(t.prefaulted for t in tallies),
                max(0, requested - sum(t.accounted for t in tallies)),
            ),
            before=self._before,
            after=self._after,
            seconds=Seconds(
                self._populate_seconds,
                self._prefault_seconds,
                self._paused_seconds,
                self._longest_pause,
                time.monotonic() - started,
            ),
            warnings=tuple(Caveat(code, text) for code, text in self._caveats.items()),
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _overlaps(item: Range, target: Target) -> bool:
    return item.start < target.hva + target.size and target.hva < item.start + item.size
