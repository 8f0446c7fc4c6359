# SPDX-License-Identifier: GPL-2.0-or-later
"""Set the scheduling policy of a guest's vCPUs, as an operator may do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for

from .limits import cgroups, in_group

#: The policies for :func:`set_policy`. The last four are scheduling policies in sched(7).
POLICIES = ("nice", "pinned", "fifo", "rr", "batch", "idle")


def vcpu_threads(guest: Guest) -> list[int]:
    return [cpu["thread-id"] for cpu in guest.qmp("query-cpus-fast")]


def set_policy(tid: int, policy: str) -> None:
    """Apply one of POLICIES to a thread, and ignore any other policy."""
    if policy == "nice":
        os.setpriority(os.PRIO_PROCESS, tid, 10)
    elif policy == "pinned":
        os.sched_setaffinity(tid, {min(os.sched_getaffinity(0))})
    elif policy in POLICIES:
        number: int = getattr(os, f"SCHED_{policy.upper()}")
        priority = 1 if policy in ("fifo", "rr") else 0
        os.sched_setscheduler(tid, number, os.sched_param(priority))


def limit_cpu(tid: int, group: Path, unified: bool) -> None:
    """Move a thread to a cgroup that may use half a CPU, as libvirt does with vCPUs.

    The group's parent must be the process's cgroup. This function creates the group if necessary.

    :param unified: Whether the hierarchy is v2.
    """
    if not group.exists():
        group.mkdir()
        if unified:
            (group / "cgroup.type").write_text("threaded")
            (group.parent / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text("50000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("50000")
    (group / ("cgroup.threads" if unified else "tasks")).write_text(str(tid))


@dataclass(frozen=True)
class Scheduling:
    """One scheduling of the vCPUs of several guests.

    :ivar policy: "other", "quota" for half a CPU for each name, or one of POLICIES.
    :ivar group: The parent cgroup of all QEMUs for "quota", or None.
    :ivar unified: Whether the hierarchy of ``group`` is v2.
    """

    policy: str
    group: Path | None = None
    unified: bool = False

    @property
    def prefix(self) -> list[str]:
        """The arguments to prepend to QEMU's command."""
        return in_group(self.group) if self.group else []

    def apply(self, tid: int, name: str) -> None:
        """Schedule the thread of a vCPU.

        :param name: The name of the guest, whose vCPUs share one quota.
        """
        if self.group:
            limit_cpu(tid, self.group / name, self.unified)
        else:
            set_policy(tid, self.policy)


@contextmanager
def scheduling(policy: str) -> Iterator[Scheduling]:
    """Yield a Scheduling. All QEMUs must have been killed when the block ends."""
    if policy != "quota":
        yield Scheduling(policy)
        return
    with cgroups("cpu") as ((group,), unified):
        try:
            yield Scheduling(policy, group, unified)
        finally:
            remove_cpu_limits(group)


def remove_cpu_limits(parent: Path) -> None:
    """Wait until a cgroup's processes have exited, and remove the cgroup's children."""
    for group in (path for path in parent.iterdir() if path.is_dir()):
        name = "cgroup.threads" if (group / "cgroup.type").exists() else "tasks"
        _wait_empty(group / name)
        group.rmdir()
    _wait_empty(parent / "cgroup.procs")


def _wait_empty(members: Path) -> None:
    wait_for(lambda: not members.read_text(), f"QEMU has left {members.parent}")
