# SPDX-License-Identifier: GPL-2.0-or-later
"""Prefault a restored guest before it runs, without QEMU's monitor.

After RAM is loaded and before the vCPUs run, libvirt calls its hook and waits for it. At that time,
only libvirt is connected to QEMU's monitor, and a hook must not call libvirt. Therefore this module
reads the names of the vCPU threads and the file descriptors in ``/proc``. The addresses of a PC's
RAM depend on the machine type and the RAM size (pc_init1() in hw/i386/pc_piix.c, and pc_q35_init()
in hw/i386/pc_q35.c). An incorrect address does no harm, because the ioctl fails with ENOENT for an
address without a memory slot (kvm_tdp_map_page() in arch/x86/kvm/mmu/mmu.c). Populating memory
needs only QEMU's virtual addresses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..agents.base import VcpuThread
from ..agents.injector import choose_threads
from ..agents.ptrace import PtraceAgent
from ..engine.executor import Executor
from ..engine.plan import BALLOON_INFLATED, SHARED_FILE, Target
from ..engine.tally import RunTally
from ..engine.vm import Backing
from ..errors import Code, RefusedError, UnsupportedError
from ..host import kvm
from ..host.fds import kvm_fds
from ..host.kvm import debugfs_leaves
from ..host.mapped_file import is_disk_file
from ..host.mappings import MemoryMapping, backing_of
from ..host.memory_source import MemorySource, source_of
from ..host.pagemap import Pagemap
from ..host.procfs import FUTEX, Process, thread_names
from ..host.reservations import Reservation
from ..qemu.memory_map import MemorySection
from .domain_xml import Domain

KIB_640, MIB, GIB_4 = 0xA0000, 1 << 20, 4 << 30
AMD_HOLE = 0xFD_0000_0000
#: The machine property on QEMU's command line that makes the guest confidential.
CONFIDENTIAL: Final = "confidential-guest-support"

#: Name of a vCPU thread with ``-name …,debug-threads=on``, which libvirt always passes.
_VCPU_NAME: Final = re.compile(r"CPU ([0-9]+)/KVM")


@dataclass(frozen=True, slots=True)
class PrelaunchResult:
    """The result of :func:`prefault_before_start`, in bytes and seconds.

    :ivar remaining: Requested bytes that were not prefaulted or not verified.
    :ivar notes: The reasons why bytes remain, and warnings.
    """

    requested: int
    populated: int
    prefaulted: int
    remaining: int
    seconds: float
    notes: tuple[str, ...]


def boot_ram(machine: str, memory: int) -> tuple[tuple[int, int, int], ...]:
    """Return each range of a PC's RAM as (gpa, size, offset in the RAM block).

    All numbers are in bytes. The result does not contain the range from 640 KiB to 1 MiB, because
    firmware remaps it.

    :param machine: The machine type, for example ``pc-q35-8.2``.
    :param memory: The boot memory in bytes.
    :raises UnsupportedError: If the memory layout of this machine type is not known.
    """
    if re.match(r"(pc-)?q35", machine):
        low = 0x80000000 if memory >= 0xB0000000 else memory
    elif re.match(r"pc(-i440fx.*)?$", machine):
        low = 0xC0000000 if memory >= 0xE0000000 else memory
    else:
        raise UnsupportedError(
            f"the RAM addresses of machine type {machine or '(none)'} are not known",
            'set restore="later" in the hook configuration',
            code=Code.LAYOUT,
        )
    ranges = [(0, min(KIB_640, low), 0)]
    if low > MIB:
        ranges.append((MIB, low - MIB, MIB))
    if memory > low:
        ranges.append((GIB_4, memory - low, low))
    return tuple(ranges)


def check_plain_layout(arguments: Sequence[str], memory: int) -> None:
    """Raise an error if RAM may be outside the result of :func:`boot_ram`.

    :param arguments: QEMU's command line.
    :param memory: The boot memory in bytes.
    :raises UnsupportedError: If ``max-ram-below-4g`` is set, or if RAM can reach the addresses just
        below 1 TiB. AMD hosts reserve these addresses for HyperTransport
        (pc_set_amd_above_4g_mem_start(), hw/i386/pc.c, since QEMU 7.1).
    """
    moved = any("max-ram-below-4g" in argument for argument in arguments)
    if moved or memory > AMD_HOLE - GIB_4:
        why = (
            "max-ram-below-4g is set"
            if moved
            else "RAM may reach the range below 1 TiB that AMD hosts reserve"
        )
        raise UnsupportedError(
            f"the RAM addresses of this guest are not known: {why}",
            'set restore="later" in the hook configuration',
            code=Code.LAYOUT,
        )


def ram_mapping(maps: Sequence[MemoryMapping], memory: int) -> MemoryMapping:
    """Return QEMU's only writable mapping whose size is that of guest RAM.

    :param maps: The mappings of the QEMU process.
    :param memory: The boot memory in bytes.
    :raises RefusedError: If the number of writable mappings of this size is not one.
    """
    found = [m for m in maps if m.writable and m.size == memory]
    if len(found) != 1:
        raise RefusedError(
            f"QEMU has {len(found)} mappings of the size of the guest's RAM ({memory >> 20} MiB) "
            "instead of one",
            'set restore="later" in the hook configuration',
            code=Code.LAYOUT,
        )
    return found[0]


def vcpu_threads(process: Process) -> list[VcpuThread]:
    """Return QEMU's vCPUs with their threads and KVM file descriptors.

    The function sorts the threads by the number in their name, and the descriptors by vCPU id. It
    then pairs threads and descriptors in this order.

    :raises UnsupportedError: If the vCPU threads and KVM's vCPUs do not match.
    :raises RefusedError: If a vCPU is running.
    """
    named = {}
    for tid, name in thread_names(process.pid).items():
        if match := _VCPU_NAME.fullmatch(name):
            named[int(match[1])] = tid
    fds = sorted(kvm_fds(process).vcpus.items())
    if not named or len(named) != len(fds):
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has {len(named)} threads with vCPU names, but {len(fds)} "
            "KVM vCPU file descriptors",
            "check that the domain has <domain type='kvm'>: virsh dumpxml DOMAIN",
            code=Code.NOT_KVM,
        )
    threads = []
    for (_, tid), (vcpu_id, fd) in zip(sorted(named.items()), fds, strict=True):
        if process.waits_in(tid) != FUTEX:  # as stopped vCPUs do
            raise RefusedError(
                "the guest is already running, so it cannot be prefaulted before it starts",
                'set restore="later" or restore="follow" in the hook configuration',
                code=Code.RUNNING,
            )
        threads.append(VcpuThread(tid, fd, vcpu_id))
    return threads


class _OneMapping:
    """Returns the backing of one mapping for every memory section."""

    def __init__(self, source: MemorySource) -> None:
        mapping = source.mapping
        self._backing = Backing(backing_of(mapping, source.page_size), not mapping.shared)
        self._source = source

    def backing(self, _section: MemorySection) -> Backing:
        return self._backing

    def memory_source(self, _section: MemorySection) -> MemorySource:
        return self._source


async def prefault_before_start(
    process: Process, domain: Domain, seconds: float, populate: str = "auto"
) -> PrelaunchResult:
    """Populate and prefault a guest that is loaded but does not run yet.

    :param seconds: Time limit in seconds. Memory that is not prefaulted within this time counts as
        remaining.
    :param populate: The memory to populate, as a value of ``--populate``.
    :raises UnsupportedError: If the domain or the host does not support prefaulting before the
        start. Nothing was changed.
    :raises RefusedError: If the guest runs, or if its RAM was not found. Nothing was changed.
    :raises FailedError: If a step failed, or if QEMU has exited.
    """
    started = time.monotonic()
    capability = kvm.pre_fault_capability(process)
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code=Code.NO_CAPABILITY)
    if domain.nodes > 1:
        raise UnsupportedError(
            "the domain has several NUMA nodes, and only QEMU's monitor can report their RAM",
            'set restore="later" in the hook configuration',
            code=Code.LAYOUT,
        )
    check_plain_layout(process.arguments(), domain.memory)
    ranges = boot_ram(domain.machine, domain.memory)
    mapping = ram_mapping(process.maps(), domain.memory)
    source = source_of(process, mapping)
    threads = choose_threads(process, vcpu_threads(process))
    tally = RunTally()
    notes = []
    with Pagemap(process) as pagemap, Reservation() as reservation:
        absent = (
            domain.memory - pagemap.sums(mapping.start, mapping.size, not mapping.shared).present
        )
        why_not = _reason_not_to_populate(source, domain, absent, populate, reservation)
        if why_not:
            notes.append(why_not)
        targets = [
            Target(
                _section(gpa, size, mapping.start + offset, source.page_size),
                gpa,
                size,
                not why_not,
                why_not,
            )
            for gpa, size, offset in ranges
        ]
        agent = PtraceAgent(process, threads)
        executor = Executor(
            _OneMapping(source),
            agent,
            pagemap,
            tally,
            lambda phase, done, total: None,
            reservation=reservation,
        )
        tally.before = debugfs_leaves(process)
        await agent.start()
        try:
            with executor.time_limit(max(0.0, seconds - (time.monotonic() - started))):
                await executor.populate(targets)
                await agent.hold_vcpus()
                left = await executor.prefault(targets)
        finally:
            agent.abort()
            await agent.close()
        tally.after = debugfs_leaves(process)
    if tally.after is not None:
        tally.verify()
    if left:
        notes.append(
            f"the time limit expired, and {sum(t.size for t in left) >> 20} MiB were not prefaulted"
        )
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
    source: MemorySource, domain: Domain, absent: int, populate: str, reservation: Reservation
) -> str | None:
    """Reserve absent memory, or return the reason why it may not be populated."""
    if populate == "resident":
        return 'populate="resident"'
    if populate == "auto" and domain.current < domain.memory:
        return BALLOON_INFLATED
    if populate == "auto" and any(CONFIDENTIAL in text for text in source.process.arguments()):
        return f"{CONFIDENTIAL}: private memory is not in QEMU's mapping"
    if populate == "auto" and is_disk_file(source.process, source.mapping):
        return SHARED_FILE
    with reservation.check() as others:
        limits = source.limits(absent)
        for limit in limits:
            available = max(0, limit.available - others.get(limit.key, 0))
            if limit.unknown or limit.need(absent) > available:
                short = f"{limit.name} has only {available >> 20} MiB available"
                return limit.unknown or short
        reservation.reserve({limit.key: limit.need(absent) for limit in limits})
    return None


def _section(gpa: int, size: int, hva: int, page_size: int) -> MemorySection:
    return MemorySection(
        name=f"ram@{gpa:#x}",
        gpa=gpa,
        size=size,
        hva=hva,
        offset=0,
        page_size=page_size,
        memdev=None,
        device=None,
        share=None,
        reserve=None,
        node=None,
        skipped=None,
        skip_code=None,
    )
