# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the vCPUs that run no nested guest, and decide whether to retry.

While a vCPU runs a nested (L2) guest, KVM has L2's page tables loaded. If the guest's hypervisor
uses nested paging, the prefault ioctl fails with EOPNOTSUPP. If the hypervisor uses shadow paging,
the ioctl succeeds. However, it fills the page-table root for guest mode (``guest_mode`` in ``union
kvm_mmu_page_role``, arch/x86/include/asm/kvm_host.h) and not the root that the guest itself uses.
In both cases, :mod:`.run` resumes the guest and pauses it again.
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
from ..qemu.kvm_stats import read_vcpu_stats
from ..qemu.monitor import Monitor
from .executor import Executor
from .tally import RunTally

#: Maximum number of times that a run stops the guest to find a vCPU that is not in guest mode. If
#: the only vCPU runs a busy nested guest, about two of three attempts fail in the lab.
GUEST_MODE_TRIES: Final = 50
#: Maximum total time of these attempts, in seconds.
GUEST_MODE_SECONDS: Final = 5.0
#: Bounds of the random delay between two attempts, in seconds. The guest runs during this delay.
#: With a constant delay, every attempt could hit the same phase of the guest's timer.
GUEST_MODE_WAIT: Final = (0.002, 0.02)


class GuestMode:
    """Finds the vCPUs in guest mode while the guest is paused."""

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
        """Store the arguments.

        :param threads: The workers' vCPUs, in the order of the workers.
        :param stats: The vCPUs' counters in the same order, or None to read the counters over QMP.
        :param chosen: Whether the user chose these vCPUs. If True, the guest may have more vCPUs.
        """
        self._monitor = monitor
        self._executor = executor
        self._tally = tally
        self._threads = threads
        self._stats = stats
        self._every = "every chosen vCPU" if chosen else "every vCPU"

    async def let_the_guest_run(self, seconds: float = 0.0) -> None:
        """Let the guest run for ``seconds`` plus a random delay."""
        # The delay only has to differ from the guest's own periods.
        await asyncio.sleep(seconds + random.uniform(*GUEST_MODE_WAIT))  # nosec B311

    @staticmethod
    def worth_another_try(tries: int, began: float) -> bool:
        """Return whether the limits on attempts and on time allow another attempt.

        :param tries: The number of attempts so far.
        :param began: ``time.monotonic()`` at the first attempt.
        """
        return tries < GUEST_MODE_TRIES and time.monotonic() - began < GUEST_MODE_SECONDS

    async def select_vcpus(self) -> bool:
        """Mark the vCPUs in guest mode as unusable until the next pause.

        A vCPU does not change its mode while the guest is paused.

        :returns: False if all vCPUs are in guest mode. In this case, the method marks no vCPU.
        """
        self._executor.reconsider_vcpus()
        in_guest_mode = await self.workers()
        if len(in_guest_mode) == len(self._executor.agent.workers):
            return False
        self._executor.unusable |= dict.fromkeys(in_guest_mode, errno.EOPNOTSUPP)
        return True

    async def workers(self) -> set[int]:
        """Return the indexes of the workers whose vCPU runs a nested guest.

        The ``guest_mode`` counter needs Linux 5.14, and ``query-stats`` needs QEMU 7.1. With
        earlier versions, the result is empty, and only the ioctl's error shows the mode.
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
        """Return True if all vCPUs are unusable and an ioctl failed with EOPNOTSUPP."""
        unusable = self._executor.unusable
        errors = [unusable.get(worker.index) for worker in self._executor.agent.workers]
        return None not in errors and errno.EOPNOTSUPP in errors

    def warn(self, caught: bool, tries: int, seconds: float, will_resume: bool) -> None:
        """Record a warning if attempts failed because of guest mode.

        :param caught: Whether every vCPU was in guest mode at the last attempt.
        :param tries: The number of attempts.
        :param seconds: The total duration of the attempts, in seconds.
        :param will_resume: Whether this run resumes the guest at its end.
        """
        notes, every = self._tally.warnings, self._every
        if not caught:
            if tries > 1:
                notes[Code.GUEST_MODE] = (
                    f"the guest was stopped {_times(tries - 1)} while {every} ran a nested "
                    "guest, so the run resumed the guest and stopped it again"
                )
            return
        unusable = self._executor.unusable
        if not unusable:  # the ioctl succeeded
            why = "so KVM filled the nested guest's tables, not the guest's own"
            self._tally.discard_accounted()
        else:
            why = "so KVM could not fill the guest's own tables"
            if set(unusable.values()) == {errno.EOPNOTSUPP}:
                notes.pop(Code.VCPU_UNUSABLE, None)  # the warning below covers these vCPUs
        if will_resume:
            notes[Code.GUEST_MODE] = (
                f"the guest was stopped {_times(tries)} within {seconds:.1f} s; each time, {every} "
                f"ran a nested guest, {why}. Run qemu-prefault again when the nested guests are "
                "less busy"
            )
        else:
            notes[Code.GUEST_MODE] = (
                f"the guest was paused while {every} ran a nested guest, {why}. Use --cont, "
                "which resumes the guest and stops it again, or resume the guest and run "
                "qemu-prefault again"
            )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
