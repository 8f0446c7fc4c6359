# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that run guests: which vCPUs can be used, and when it is worth trying again.

A vCPU that runs a nested guest has that guest's MMU loaded. Where its hypervisor uses nested
paging the ioctl answers EOPNOTSUPP; where it shadows page tables the ioctl succeeds, but fills
the root of guest mode (``role.guest_mode``, arch/x86/kvm/mmu) and not the one the guest itself
runs on. The loops that stop the guest again are those of :mod:`.run`.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Sequence
from typing import Final

from ..agents.base import VcpuThread
from ..errors import Code
from ..host import kvm
from ..qemu.monitor import Monitor
from ..qemu.queries import read_vcpu_stats
from .executor import Executor
from .tally import RunTally

#: How often a guest is stopped, and for how many seconds that is tried, until one of its vCPUs
#: is not in guest mode. In the lab a busy nested guest is caught there two times out of three.
GUEST_MODE_TRIES: Final = 50
GUEST_MODE_SECONDS: Final = 5.0
#: Shortest and longest time it runs in between; random, not to keep in step with its timer.
GUEST_MODE_WAIT: Final = (0.002, 0.02)


class GuestMode:
    """Which of an executor's vCPUs are in guest mode, each time the guest is paused."""

    def __init__(
        self,
        monitor: Monitor,
        executor: Executor,
        tally: RunTally,
        threads: Sequence[VcpuThread],
        stats: Sequence[kvm.BinaryStats] | None,
        *,
        chosen: bool,
    ) -> None:
        """
        :param threads: the workers' vCPUs. :param stats: likewise their counters; None where
            only QEMU can be asked for them.
        :param chosen: the user chose these vCPUs; there may be others.
        """
        self._monitor = monitor
        self._executor = executor
        self._tally = tally
        self._threads = threads
        self._stats = stats
        self._every = "every chosen vCPU" if chosen else "every vCPU"

    async def let_the_guest_run(self, seconds: float = 0.0) -> None:
        """Wait between two pauses, for at least so long."""
        await asyncio.sleep(seconds + random.uniform(*GUEST_MODE_WAIT))

    @staticmethod
    def worth_another_try(tries: int, began: float) -> bool:
        """:param began: ``time.monotonic()`` at the first try."""
        return tries < GUEST_MODE_TRIES and time.monotonic() - began < GUEST_MODE_SECONDS

    @staticmethod
    def is_last_try(tries: int) -> bool:
        return tries == GUEST_MODE_TRIES

    async def select_vcpus(self) -> bool:
        """Choose the vCPUs that are not in guest mode; False if there are none.

        Which they are does not change while the guest is paused.
        """
        self._executor.reconsider_vcpus()
        in_guest_mode = await self.workers()
        if len(in_guest_mode) == len(self._executor.agent.workers):
            return False
        self._executor.unusable |= dict.fromkeys(in_guest_mode, errno.EOPNOTSUPP)
        return True

    async def workers(self) -> set[int]:
        """Indexes of the workers whose vCPU runs a nested guest.

        Where KVM does not tell (its counter came with Linux 5.14, ``query-stats`` with QEMU
        7.1), the ioctl will.
        """
        workers = self._executor.agent.workers
        if self._stats is not None:
            pairs = zip(workers, self._stats, strict=True)
            return {worker.index for worker, stats in pairs if stats.read("guest_mode")[0]}
        counters = await read_vcpu_stats(self._monitor, ("guest_mode",))
        return {
            worker.index
            for worker, thread in zip(workers, self._threads, strict=True)
            if counters.get(thread.qom_path, {}).get("guest_mode")
        }

    def refused_every_worker(self) -> bool:
        """Whether the ioctl has told of guest mode on every vCPU, where KVM's counters do not."""
        unusable = self._executor.unusable
        errors = [unusable.get(worker.index) for worker in self._executor.agent.workers]
        return None not in errors and errno.EOPNOTSUPP in errors

    def warn(self, caught: bool, tries: int, seconds: float, will_resume: bool) -> None:
        """Record what came of it among the warnings.

        :param caught: the last pause, too, found every vCPU in guest mode.
        :param will_resume: the guest runs on.
        """
        notes, every = self._tally.warnings, self._every
        if not caught:
            if tries > 1:
                notes[Code.GUEST_MODE] = (
                    f"{_times(tries - 1)} the guest was stopped while {every} ran a nested "
                    "guest; it was let run on and stopped again"
                )
            return
        unusable = self._executor.unusable
        if not unusable:  # the ioctl did not mind
            why = "so KVM filled the tables that the nested guest runs on, not the guest's own"
            self._tally.discard_accounted()
        else:
            why = "where KVM cannot fill the guest's own tables"
            if set(unusable.values()) == {errno.EOPNOTSUPP}:
                notes.pop(Code.VCPU_UNUSABLE, None)  # which says the same
        if will_resume:
            notes[Code.GUEST_MODE] = (
                f"stopped {_times(tries)} within {seconds:.1f} s, each time {every} ran a "
                f"nested guest, {why}. The guest runs on: try again when its guests are less busy"
            )
        else:
            notes[Code.GUEST_MODE] = (
                f"the guest was paused while {every} ran a nested guest, {why}. Use --cont, "
                "which lets it run and stops it at a better moment, or run this while it runs"
            )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
