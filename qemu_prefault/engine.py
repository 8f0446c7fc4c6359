# SPDX-License-Identifier: GPL-2.0-or-later
"""Drive a plan through an agent.

The algorithm, in the order of :meth:`Engine.run`::

    is this a moment to do it?          plan.refuse_unfit
    which memory?                       plan.select
    can the host afford to populate it? Engine._check_headroom
    populate, while the guest runs      Engine._populate
    pause the guest                     Engine._pause
    read the layout again; if it changed, select and populate what is new
    prefault what is writable           Engine._prefault
    did the tables keep it?             Engine._verify
    resume the guest
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from . import kvm
from .agents import Agent, BatchResult, Kind, Limits, Outcome, Range, VcpuThread, Worker
from .agents.attach import AttachAgent
from .agents.plugin import PluginAgent, find_control_socket
from .errors import FailedError, QemuPrefaultError, RefusedError, UnsupportedError
from .guard import ResumeGuard
from .layout import Section, firmware_ahead, huge_alignment
from .monitor import EventStream, read_running, read_stage2
from .pagemap import Pagemap
from .plan import HUGE, PAGE, Policy, Populate, Target, refuse_unfit, select, stripe_by_node
from .report import Bytes, Caveat, Report, Seconds, SectionReport, Stage2, size
from .session import Session

Progress = Callable[[str, int, int], None]
"""Called with the phase ("populate", "prefault"), bytes done and bytes in all."""

LAYOUT_ROUNDS: Final = 4
#: Errors that are the vCPU's, not the range's: another vCPU may succeed.
VCPU_ERRORS: Final = (kvm.STUCK, errno.EOPNOTSUPP)


@dataclass(slots=True)
class _Tally:
    """What was done to one section so far, in bytes."""

    requested: int = 0
    populated: int = 0
    prefaulted: int = 0
    accounted: int = 0
    note: str | None = None


class Engine:
    """One prefault run on a :class:`Session`. Make a new one for each run."""

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        cont: bool = False,
        agent: str = "auto",
        on_progress: Progress = lambda phase, done, total: None,
    ) -> None:
        self.session = session
        self.policy = policy
        self.cont = cont
        self._agent_wanted = agent
        self._socket = None if agent == "attach" else find_control_socket(session.process)
        self._on_progress = on_progress
        self._tallies: dict[str, _Tally] = {}
        self._caveats: dict[str, str] = {}
        self._populate_seconds = 0.0
        self._prefault_seconds = 0.0
        self._paused_seconds = 0.0
        self._unusable: dict[int, int] = {}  # worker index -> errno
        self._interrupted: QemuPrefaultError | None = None
        self._prefaulting = False
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
        agent = self._make_agent(threads)
        await agent.start()
        async with self._watch(agent):
            try:
                await self._populate(agent, targets, pagemap)
                if not self.policy.populate_only:
                    async with self._pause(agent) as resume:
                        self._prefaulting = True
                        await self._prefault_until_stable(agent, targets, pagemap)
                        self._prefaulting = False
                        await agent.close()
                        self._after = await read_stage2(session.monitor)
                        await resume()
            finally:
                agent.abort()
                await agent.close()
        if self.policy.populate_only:
            if self.cont and self._interrupted is None:
                await session.monitor.execute("cont")
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

    async def _prefault_until_stable(
        self, agent: Agent, targets: tuple[Target, ...], pagemap: Pagemap
    ) -> None:
        """Prefault; if the layout changed meanwhile (hotplug), do what is new as well."""
        session = self.session
        self._before = await read_stage2(session.monitor)
        done: tuple[Target, ...] = ()
        for _ in range(LAYOUT_ROUNDS):
            fresh = select(await session.refresh(), self.policy)
            if fresh == done or self._interrupted:
                return
            if fresh != targets:
                self._caveats["layout-changed"] = (
                    "the guest's memory layout changed during the run; what is new was done too"
                )
                await self._populate(agent, fresh, pagemap)
            await self._prefault(agent, fresh, pagemap)
            targets = done = fresh

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
        if firmware_ahead(machine.ranges):
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
        outcomes = await self._run_all(agent, work, "populate", total)
        for target, before in present_before.items():
            backing = self.session.backing(target.section)
            after = pagemap.sums(target.hva, target.size, backing.private)
            self._tally(target.section).populated += max(0, after.present - before)
            if self.policy.populate_only:
                self._tally(target.section).requested += target.size
                self._tally(target.section).accounted += after.writable
            error = next((o.error for o in outcomes if o.error and _overlaps(o.range, target)), 0)
            if error and error != kvm.ABORTED:
                self._tally(target.section).note = f"populate: {kvm.describe_errno(error)}"

    # -- prefault ----------------------------------------------------------------------

    async def _prefault(self, agent: Agent, targets: Sequence[Target], pagemap: Pagemap) -> None:
        """Prefault the pages that are writable now; the rest would be mapped read-only."""
        total = sum(target.size for target in targets)
        window: list[tuple[int | None, Range]] = []
        sections: list[tuple[Range, Section]] = []
        finished = 0

        async def flush() -> None:
            nonlocal finished
            outcomes = await self._run_all(agent, window, "prefault", total, finished)
            for outcome in outcomes:
                owner = next(
                    section
                    for item, section in sections
                    if item.start <= outcome.range.start < item.start + item.size
                )
                tally = self._tally(owner)
                tally.prefaulted += outcome.done
                tally.accounted += outcome.done
                finished += outcome.done
                if outcome.error and outcome.error != kvm.ABORTED:
                    tally.note = f"prefault: {kvm.describe_errno(outcome.error)}"
            window.clear()
            sections.clear()

        limit = agent.ranges_per_batch // 2  # stripes cut ranges in two
        for tally in self._tallies.values():
            tally.requested = tally.prefaulted = tally.accounted = 0
        for target in targets:
            backing = self.session.backing(target.section)
            writable = 0
            for start, length in pagemap.writable(target.hva, target.size, backing.private):
                item = Range(Kind.STAGE2, target.gpa + (start - target.hva), length)
                window.append((target.section.node, item))
                sections.append((item, target.section))
                writable += length
                if len(window) >= limit:
                    await flush()
            tally = self._tally(target.section)
            tally.requested += target.size if target.touch else writable
            if target.touch and writable < target.size and tally.note is None:
                tally.note = f"{size(target.size - writable)} could not be made writable"
            if not target.touch:
                tally.note = target.why_not
        if window:
            await flush()

    async def _run_all(
        self,
        agent: Agent,
        work: Sequence[tuple[int | None, Range]],
        phase: str,
        total: int,
        base: int = 0,
    ) -> list[Outcome]:
        """Run ranges on all usable workers; what a stuck vCPU leaves, another one takes."""
        outcomes: list[Outcome] = []
        todo = list(work)
        while todo and self._interrupted is None:
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
                    # What this vCPU left, or did not come to, another one takes.
                    if outcome.left is not None and (vcpu_failed or not outcome.error):
                        todo.append((node_of[index], outcome.left))
        return outcomes

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
    async def _pause(self, agent: Agent) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Hold the guest for the block, leave its run state as it was found.

        vCPU ioctls wait for KVM_RUN to return (vcpu->mutex), so the guest has to be stopped.
        Yields a coroutine function that resumes it as early as possible.
        """
        monitor = self.session.monitor
        # Asked anew: populating takes its time, and the operator may have paused the guest.
        was_running = await read_running(monitor)
        stopped_at = 0.0

        async def resume() -> None:
            nonlocal stopped_at
            # An interrupted run leaves the guest to whoever interrupted it.
            if was_running or (self.cont and self._interrupted is None):
                await monitor.execute("cont")
            if stopped_at:
                self._paused_seconds += time.monotonic() - stopped_at
                stopped_at = 0.0

        if not was_running:
            yield resume
            return
        guard = ResumeGuard(monitor.fileno(), agent.death_orders())
        with guard:
            stopped_at = time.monotonic()
            try:
                await monitor.execute("stop")
                yield resume
            finally:
                if stopped_at and monitor.alive:  # else the block has resumed it
                    agent.abort()
                    with contextlib.suppress(QemuPrefaultError):
                        await agent.close()
                    await resume()

    @contextlib.asynccontextmanager
    async def _watch(self, agent: Agent) -> AsyncIterator[None]:
        """End the run, with the reason, when somebody else changes what it rests on."""
        monitor = self.session.monitor
        with monitor.events("RESUME", "STOP", "RESET", "SHUTDOWN", "MIGRATION") as events:
            tasks = [
                asyncio.create_task(self._follow_events(events, agent)),
                asyncio.create_task(self._follow_migration(agent)),
            ]
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
        monitor = self.session.monitor
        while True:
            await asyncio.sleep(1)
            answer = await monitor.execute("query-migrate")
            status = answer.get("status") if isinstance(answer, dict) else None
            if status is not None and status not in ("none", "completed", "failed", "cancelled"):
                self._interrupt(
                    agent,
                    RefusedError(
                        f"a migration was started during the run (query-migrate: {status})",
                        "the run was ended, so that it does not dirty every page; prefault at the "
                        "destination",
                        code="migration",
                    ),
                )
                return

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
                time.monotonic() - started,
            ),
            warnings=tuple(Caveat(code, text) for code, text in self._caveats.items()),
        )


def _overlaps(item: Range, target: Target) -> bool:
    return item.start < target.hva + target.size and target.hva < item.start + item.size
