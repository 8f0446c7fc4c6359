# SPDX-License-Identifier: GPL-2.0-or-later
"""A restored guest, prefaulted before it runs, by a process that has no monitor.

Between "RAM is loaded" and "the vCPUs run" libvirt calls its hook and waits for it. Nobody
but libvirt has QEMU's monitor then, and libvirt may not be asked. So what a monitor would tell
comes from elsewhere: the vCPUs' threads bear names, their descriptors are in ``/proc``, and
where a PC has its RAM follows from its machine type and size (pc_init1(), hw/i386/pc_piix.c;
pc_q35_init(), hw/i386/pc_q35.c). It does no harm where that is wrong: the ioctl of an address
without a slot is ENOENT, and memory is populated by QEMU's own addresses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .. import kvm
from ..accounts import Accounts
from ..agents import VcpuThread
from ..agents.attach import AttachAgent
from ..errors import RefusedError, UnsupportedError
from ..layout import Section
from ..pagemap import Pagemap
from ..plan import Target
from ..process import Mapping, Process, backing_of, thread_names
from ..report import Stage2
from ..session import Backing
from ..work import Work
from .domain_xml import Domain

KIB_640, MIB, GIB_4 = 0xA0000, 1 << 20, 4 << 30
DEBUGFS: Final = Path("/sys/kernel/debug/kvm")
#: How `-name …,debug-threads=on`, which libvirt always gives, calls a vCPU's thread.
_VCPU_NAME: Final = re.compile(r"CPU ([0-9]+)/KVM")
_FUTEX: Final = "202 "  # a vCPU that is stopped waits for its condition


@dataclass(frozen=True, slots=True)
class Done:
    """What came of it; bytes and seconds. ``remaining``: there was no time, or no way."""

    requested: int
    populated: int
    prefaulted: int
    remaining: int
    seconds: float
    notes: tuple[str, ...]


def boot_ram(machine: str, memory: int) -> tuple[tuple[int, int, int], ...]:
    """Where a PC of so much RAM has it: (gpa, size, offset in the RAM block), in bytes.

    The hole below 1 MiB is firmware's affair, and left out.

    :raise UnsupportedError: another kind of machine.
    """
    if re.match(r"(pc-)?q35", machine):
        low = 0x80000000 if memory >= 0xB0000000 else memory
    elif re.match(r"pc(-i440fx.*)?$", machine):
        low = 0xC0000000 if memory >= 0xE0000000 else memory
    else:
        raise UnsupportedError(
            f"where a {machine or 'machine of unknown type'} has its RAM is not known",
            'use restore="later"',
            code="layout",
        )
    ranges = [(0, min(KIB_640, low), 0)]
    if low > MIB:
        ranges.append((MIB, low - MIB, MIB))
    if memory > low:
        ranges.append((GIB_4, memory - low, low))
    return tuple(ranges)


def ram_mapping(maps: Sequence[Mapping], memory: int) -> Mapping:
    """QEMU's mapping of the guest's RAM: the one that is writable and of just this size.

    :raise RefusedError: there are none or several.
    """
    found = [m for m in maps if m.writable and m.size == memory]
    if len(found) != 1:
        raise RefusedError(
            f"{len(found)} mappings of QEMU could be the guest's RAM ({memory >> 20} MiB)",
            'use restore="later"',
            code="layout",
        )
    return found[0]


def vcpu_threads(process: Process) -> list[VcpuThread]:
    """QEMU's vCPUs by their threads' names, with KVM's descriptors in the same order.

    :raise RefusedError: one of them runs.
    """
    named = {}
    for tid, name in thread_names(process.pid).items():
        if match := _VCPU_NAME.fullmatch(name):
            named[int(match[1])] = tid
    fds = sorted(process.kvm_fds().vcpus.items())
    if not named or len(named) != len(fds):
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has {len(named)} vCPU threads that can be told, and "
            f"{len(fds)} vCPUs of KVM's",
            "does its domain run under KVM?",
            code="not-kvm",
        )
    threads = []
    for (_, tid), (vcpu_id, fd) in zip(sorted(named.items()), fds, strict=True):
        if not (process.thread_syscall(tid) or "").startswith(_FUTEX):
            raise RefusedError(
                "the guest runs already: there is no window",
                'use "later" or "follow"',
                code="running",
            )
        threads.append(VcpuThread(tid, fd, vcpu_id))
    return threads


class _OneMapping:
    """What the guest's sections are made of: all of the same mapping."""

    def __init__(self, mapping: Mapping) -> None:
        self._backing = Backing(backing_of(mapping), not mapping.shared)

    def backing(self, _section: Section) -> Backing:
        return self._backing


async def prefault_in_window(
    process: Process, domain: Domain, seconds: float, populate: str = "auto"
) -> Done:
    """Populate and prefault a guest that is loaded and does not run, for so many seconds.

    :raise UnsupportedError, RefusedError: nothing was touched. :raise FailedError: likewise, or
        QEMU has ended.
    """
    started = time.monotonic()
    capability = kvm.pre_fault_capability(process)
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code="no-capability")
    if domain.nodes > 1:
        raise UnsupportedError(
            "the domain has several NUMA nodes: which RAM is where only a monitor tells",
            'use restore="later"',
            code="layout",
        )
    ranges = boot_ram(domain.machine, domain.memory)
    mapping = ram_mapping(process.maps(), domain.memory)
    threads = vcpu_threads(process)
    accounts = Accounts()
    notes = []
    with Pagemap(process) as pagemap:
        absent = (
            domain.memory - pagemap.sums(mapping.start, mapping.size, not mapping.shared).present
        )
        why_not = _why_not_touch(process, domain, absent, populate)
        if why_not:
            notes.append(why_not)
        targets = [
            Target(_section(gpa, size, mapping.start + offset), gpa, size, not why_not, why_not)
            for gpa, size, offset in ranges
        ]
        agent = AttachAgent(process, threads)
        work = Work(_OneMapping(mapping), agent, pagemap, accounts, lambda phase, done, total: None)
        accounts.before = read_counters(process)
        await agent.start()
        try:
            with work.time_limit(max(0.0, seconds - (time.monotonic() - started))):
                await work.populate(targets)
                left = await work.prefault(targets)
        finally:
            agent.abort()
            await agent.close()
        accounts.after = read_counters(process)
    if accounts.after is not None:
        accounts.verify()
    if left:
        notes.append(f"no time for {sum(target.size for target in left) >> 20} MiB")
    tallies = accounts.tallies.values()
    notes += sorted({tally.note for tally in tallies if tally.note and tally.note != why_not})
    notes += accounts.caveats.values()
    requested = sum(tally.requested for tally in tallies)
    return Done(
        requested,
        sum(tally.populated for tally in tallies),
        sum(tally.prefaulted for tally in tallies),
        requested - sum(tally.accounted for tally in tallies),
        time.monotonic() - started,
        tuple(notes),
    )


def _why_not_touch(process: Process, domain: Domain, absent: int, populate: str) -> str | None:
    """Why only what is there is prefaulted; None if all may be populated."""
    if populate == "resident":
        return 'populate="resident"'
    if populate == "auto" and domain.current < domain.memory:
        return "the balloon holds some of the guest's memory"
    for limit in process.memory_headroom():
        if absent > limit.available:
            return f"{limit.name} has only {limit.available >> 20} MiB to give"
    return None


def _section(gpa: int, size: int, hva: int) -> Section:
    return Section(
        name=f"ram@{gpa:#x}",
        gpa=gpa,
        size=size,
        hva=hva,
        offset=0,
        page_size=4096,
        memdev=None,
        device=None,
        share=None,
        reserve=None,
        node=None,
        skipped=None,
        skip_code=None,
    )


def read_counters(process: Process) -> Stage2 | None:
    """KVM's counts of stage-2 leaves, from debugfs; None where that is not to be had."""
    counts = _read_counts(process, tuple(Stage2.__dataclass_fields__))
    return None if counts is None else Stage2(*counts)


def total_faults(process: Process) -> int | None:
    """KVM's ``pf_taken`` of all vCPUs, likewise."""
    counts = _read_counts(process, ("pf_taken",))
    return None if counts is None else counts[0]


def _read_counts(process: Process, names: Sequence[str]) -> list[int] | None:
    """KVM names a VM's directory by the pid and the descriptor that it was created with
    (kvm_create_vm_debugfs(), virt/kvm/kvm_main.c).
    """
    try:
        directory = DEBUGFS / f"{process.pid}-{process.kvm_fds().vm}"
        return [int((directory / name).read_text()) for name in names]
    except (OSError, ValueError):
        return None
