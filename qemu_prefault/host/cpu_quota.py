# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the limit on QEMU's CPU time, and derive how much of it helpers may use.

If the threads of a cgroup have used up its quota, the kernel stops all of them until the next
period, also QEMU's main loop and the vCPUs (Documentation/scheduler/sched-bwc.rst). Therefore
helpers use at most a part of the quota: they populate in small chunks, and rest after each chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .headroom import directories_of
from .proc_files import parse_number, read_optional
from .procfs import Process

#: Helpers use at most the quota divided by this number.
PART: Final = 4
#: The chunk of a helper that rests: minimum and maximum, in bytes.
LEAST_CHUNK, MOST_CHUNK = 64 << 10, 1 << 20
#: CPU time that populating 4 KiB takes on a slow host, in microseconds.
PAGE_US: Final = 4


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """A limit on the CPU time of QEMU's threads.

    :ivar name: The name of the limit, for messages.
    :ivar quota_us: The CPU time per period, in microseconds.
    :ivar period_us: The period in microseconds.
    """

    name: str
    quota_us: int
    period_us: int

    @property
    def cpus(self) -> float:
        """The limit as a number of CPUs."""
        return self.quota_us / self.period_us

    @property
    def helpers(self) -> int:
        """The number of helpers that can run at once, which is at least 1."""
        return max(1, int(self.cpus / PART))

    @property
    def rest_percent(self) -> int:
        """The time for which a helper rests, in percent of the CPU time that it has used."""
        return max(0, math.ceil((PART / self.cpus - 1) * 100))

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk that uses only a small part of the quota of one period."""
        pages = self.quota_us // (PART * PAGE_US)
        return min(max(pages << 12, LEAST_CHUNK), MOST_CHUNK)

    def warning(self) -> str:
        """Return the text of a warning that this limit makes a run slower."""
        return (
            f"QEMU may use only {self.cpus:g} CPUs ({self.name}: {self.quota_us} us per "
            f"{self.period_us} us), so the run takes longer: the helpers use at most a quarter of "
            "this time to populate"
        )


def parse_quota(text: str, period: str | None = None) -> tuple[int, int] | None:
    """Return a quota and its period in microseconds, or None for no limit.

    :param text: The text of ``cpu.max``, or of ``cpu.cfs_quota_us`` with cgroup v1.
    :param period: The text of ``cpu.cfs_period_us`` with cgroup v1.
    """
    words = [*text.split(), *(period or "").split()]
    numbers = [parse_number(word) for word in words]
    if len(numbers) != 2 or not numbers[0] or not numbers[1]:
        return None
    return numbers[0], numbers[1]


def quotas_of(directories: Iterable[tuple[str, bool]]) -> list[CpuQuota]:
    """Return the quotas of cgroups.

    :param directories: The result of :func:`~.headroom.cgroup_directories`.
    """
    found = []
    for directory, unified in directories:
        name = f"{directory}/{'cpu.max' if unified else 'cpu.cfs_quota_us'}"
        period = None if unified else read_optional(f"{directory}/cpu.cfs_period_us")
        numbers = parse_quota(read_optional(name) or "", period)
        if numbers is not None:
            found.append(CpuQuota(name, *numbers))
    return found


def cpu_quota(process: Process) -> CpuQuota | None:
    """Return the strictest limit on the CPU time of QEMU's main thread, or None.

    Helpers move to the cgroups of the main thread (:func:`.placement.leave_cgroups`). The limits of
    all ancestors also apply.
    """
    quotas = quotas_of(directories_of(process, "cpu"))
    return min(quotas, key=lambda quota: quota.cpus, default=None)
