# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of a run."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Populate(enum.StrEnum):
    """The absent memory that a run may populate."""

    #: All RAM, except memory that must stay absent (virtio-mem, balloon, overcommit).
    AUTO = "auto"
    #: All memory in the memory slots.
    ALL = "all"
    #: No memory. The run prefaults only memory that is present and writable.
    RESIDENT = "resident"


class AgentChoice(enum.StrEnum):
    """The agent that calls the ioctl inside QEMU."""

    #: The plugin if QEMU has loaded it, otherwise QEMU's own command if QEMU is patched, otherwise
    #: attach.
    AUTO = "auto"
    #: Helper threads, which ptrace starts inside QEMU.
    ATTACH = "attach"
    #: ``qemu-prefault-plugin.so``, if QEMU was started with it.
    PLUGIN = "plugin"
    #: QEMU's own ``x-kvm-prefault-memory`` command, if QEMU has it.
    QMP = "qmp"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run, which correspond to those of the command line.

    :ivar populate: The absent memory that the run may populate.
    :ivar ranges: Guest-physical ranges (start, size) in bytes. An empty tuple means all RAM.
    :ivar max_bytes: The maximum number of bytes to prefault, starting at the lowest address. None
        means no limit.
    :ivar vcpus: The indexes of the vCPUs to use (``cpu-index`` in ``query-cpus-fast``). An empty
        tuple means all vCPUs.
    :ivar populate_only: Whether to fill QEMU's own page tables, but not the stage-2 tables.
    :ivar force: Whether to populate even if the host seems to have too little memory, or if QEMU's
        cgroups cannot be read.
    :ivar chunk_bytes: The maximum number of bytes to prefault with one system call. None means
        32 MiB.
    :ivar max_downtime: The maximum length of one pause of the guest, in seconds. None means no
        limit.
    :ivar cont: Whether to resume the guest after the run even if it was paused before the run.
    :ivar incoming: Whether to wait for the guest of a QEMU that was started with ``-incoming``, and
        to prefault this guest before it starts.
    :ivar dry_run: Whether to report what a run would do, without changing anything.
    :ivar agent: The agent that calls the ioctl inside QEMU.
    """

    populate: Populate = Populate.AUTO
    ranges: tuple[tuple[int, int], ...] = ()
    max_bytes: int | None = None
    vcpus: tuple[int, ...] = ()
    populate_only: bool = False
    force: bool = False
    chunk_bytes: int | None = None
    max_downtime: float | None = None
    cont: bool = False
    incoming: bool = False
    dry_run: bool = False
    agent: AgentChoice = AgentChoice.AUTO
