# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user asked for."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Populate(enum.StrEnum):
    """Which memory may be touched that the guest has not touched yet."""

    AUTO = "auto"
    """All RAM, except where memory is absent on purpose (virtio-mem, balloon, overcommit)."""
    ALL = "all"
    """Everything in the memory slots."""
    RESIDENT = "resident"
    """Nothing new: only what is present and writable is prefaulted."""


class AgentChoice(enum.StrEnum):
    """Who issues the ioctl inside QEMU."""

    AUTO = "auto"
    """The plugin if QEMU has it loaded, else QEMU itself if it is patched, else attach."""
    ATTACH = "attach"
    """Helper threads, started inside QEMU by ptrace."""
    PLUGIN = "plugin"
    """``qemu-prefault-plugin.so``, if QEMU was started with it."""
    QMP = "qmp"
    """QEMU itself, if it has ``x-kvm-prefault-memory``."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, as the options of the command line of the same names.

    ``ranges``: guest-physical (start, size) in bytes; empty: all. ``max_bytes``: stop there,
    lowest addresses first. ``vcpus``: indexes of ``query-cpus-fast``; empty: all.
    ``populate_only``: fill QEMU's own page tables, not stage-2. ``force``: populate even if
    memory looks too short. ``chunk_bytes``: most that one system call is asked for; None: 32 MiB.
    ``max_downtime``: seconds a guest may be kept from running at one go; None: as long as it
    takes. ``cont``: resume the guest afterwards, also if it was paused. ``incoming``: wait for the
    guest of a QEMU started with ``-incoming``, and prefault it before it starts. ``dry_run``: say
    what would be done; touch nothing.
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
