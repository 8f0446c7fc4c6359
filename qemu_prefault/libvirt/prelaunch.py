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
from typing import Final

from ..agents.base import VcpuThread
from ..agents.ptrace import PtraceAgent, choose_threads
from ..engine.executor import Executor
from ..engine.plan import Target
from ..engine.tally import RunTally
from ..engine.vm import Backing
from ..errors import Code, RefusedError, UnsupportedError
from ..host import kvm
from ..host.fds import kvm_fds
from ..host.headroom import memory_headroom
from ..host.kvm import debugfs_leaves
from ..host.pagemap import Pagemap
from ..host.procfs import MemoryMapping, Process, backing_of, thread_names
from ..qemu.memory_map import MemorySection
from ..units import PAGE_SIZE
from .domain_xml import Domain

KIB_640, MIB, GIB_4 = 0xA0000, 1 << 20, 4 << 30

#: How `-name …,debug-threads=on`, which libvirt always gives, calls a vCPU's thread.
_VCPU_NAME: Final = re.compile(r"CPU ([0-9]+)/KVM")
_FUTEX: Final = "202 "  # a vCPU that is stopped waits for its condition


@dataclass(frozen=True, slots=True)
class PrelaunchResult:
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
            code=Code.LAYOUT,
        )
    ranges = [(0, min(KIB_640, low), 0)]
    if low > MIB:
        ranges.append((MIB, low - MIB, MIB))
    if memory > low:
        ranges.append((GIB_4, memory - low, low))
    return tuple(ranges)


def ram_mapping(maps: Sequence[MemoryMapping], memory: int) -> MemoryMapping:
    """QEMU's mapping of the guest's RAM: the one that is writable and of just this size.

    :raise RefusedError: there are none or several.
    """
    found = [m for m in maps if m.writable and m.size == memory]
    if len(found) != 1:
        raise RefusedError(
            f"{len(found)} mappings of QEMU could be the guest's RAM ({memory >> 20} MiB)",
            'use restore="later"',
            code=Code.LAYOUT,
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
    fds = sorted(kvm_fds(process).vcpus.items())
    if not named or len(named) != len(fds):
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has {len(named)} vCPU threads that can be told, and "
            f"{len(fds)} vCPUs of KVM's",
            "does its domain run under KVM?",
            code=Code.NOT_KVM,
        )
    threads = []
    for (_, tid), (vcpu_id, fd) in zip(sorted(named.items()), fds, strict=True):
        if not (process.thread_syscall(tid) or "").startswith(_FUTEX):
            raise RefusedError(
                "the guest runs already: there is no window",
                'use "later" or "follow"',
                code=Code.RUNNING,
            )
        threads.append(VcpuThread(tid, fd, vcpu_id))
    return threads


class _OneMapping:
    """What the guest's sections are made of: all of the same mapping."""

    def __init__(self, mapping: MemoryMapping) -> None:
        self._backing = Backing(backing_of(mapping), not mapping.shared)

    def backing(self, _section: MemorySection) -> Backing:
        return self._backing


async def prefault_before_start(
    process: Process, domain: Domain, seconds: float, populate: str = "auto"
) -> PrelaunchResult:
    """Populate and prefault a guest that is loaded and does not run, for so many seconds.

    :raise UnsupportedError, RefusedError: nothing was touched. :raise FailedError: likewise, or
        QEMU has ended.
    """
    started = time.monotonic()
    capability = kvm.pre_fault_capability(process)
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code=Code.NO_CAPABILITY)
    if domain.nodes > 1:
        raise UnsupportedError(
            "the domain has several NUMA nodes: which RAM is where only a monitor tells",
            'use restore="later"',
            code=Code.LAYOUT,
        )
    ranges = boot_ram(domain.machine, domain.memory)
    mapping = ram_mapping(process.maps(), domain.memory)
    threads = choose_threads(process, vcpu_threads(process))
    tally = RunTally()
    notes = []
    with Pagemap(process) as pagemap:
        absent = (
            domain.memory - pagemap.sums(mapping.start, mapping.size, not mapping.shared).present
        )
        why_not = _reason_not_to_populate(process, domain, absent, populate)
        if why_not:
            notes.append(why_not)
        targets = [
            Target(_section(gpa, size, mapping.start + offset), gpa, size, not why_not, why_not)
            for gpa, size, offset in ranges
        ]
        agent = PtraceAgent(process, threads)
        executor = Executor(
            _OneMapping(mapping), agent, pagemap, tally, lambda phase, done, total: None
        )
        tally.before = debugfs_leaves(process)
        await agent.start()
        try:
            with executor.time_limit(max(0.0, seconds - (time.monotonic() - started))):
                await executor.populate(targets)
                left = await executor.prefault(targets)
        finally:
            agent.abort()
            await agent.close()
        tally.after = debugfs_leaves(process)
    if tally.after is not None:
        tally.verify()
    if left:
        notes.append(f"no time for {sum(target.size for target in left) >> 20} MiB")
    sections = tally.tallies.values()
    notes += sorted({s.note for s in sections if s.note and s.note != why_not})
    notes += tally.warnings.values()
    notes += agent.warnings.values()
    requested = sum(section.requested for section in sections)
    return PrelaunchResult(
        requested,
        sum(section.populated for section in sections),
        sum(section.prefaulted for section in sections),
        requested - sum(section.accounted for section in sections),
        time.monotonic() - started,
        tuple(notes),
    )


def _reason_not_to_populate(
    process: Process, domain: Domain, absent: int, populate: str
) -> str | None:
    """Why only what is there is prefaulted; None if all may be populated."""
    if populate == "resident":
        return 'populate="resident"'
    if populate == "auto" and domain.current < domain.memory:
        return "the balloon holds some of the guest's memory"
    for limit in memory_headroom(process):
        if absent > limit.available:
            return f"{limit.name} has only {limit.available >> 20} MiB to give"
    return None


def _section(gpa: int, size: int, hva: int) -> MemorySection:
    return MemorySection(
        name=f"ram@{gpa:#x}",
        gpa=gpa,
        size=size,
        hva=hva,
        offset=0,
        page_size=PAGE_SIZE,
        memdev=None,
        device=None,
        share=None,
        reserve=None,
        node=None,
        skipped=None,
        skip_code=None,
    )
