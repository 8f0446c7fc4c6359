# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU, found and identified: what the public API hands out and the commands build on.

::

    async with Session.open("/run/vm.qmp") as session:
        report = await session.prefault(Policy(), cont=True)
        assert report.bytes.remaining == 0
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import kvm
from .agents import VcpuThread
from .errors import FailedError, InputError, QemuPrefaultError, UnsupportedError
from .layout import Section
from .monitor import CommandError, Machine, Monitor, read_machine
from .plan import Policy
from .process import Mapping, Process, backing_of, identify, mappings_of, thread_map

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True, slots=True)
class Backing:
    """What a section is made of in QEMU: kind, and whether the mapping is private."""

    kind: str
    private: bool

    def __str__(self) -> str:
        if self.kind == "anonymous":
            return self.kind
        return f"{self.kind}, {'private' if self.private else 'shared'}"


class Session:
    """One QEMU, found and identified. Use :meth:`open`.

    :ivar monitor: the QMP connection. :ivar process: QEMU. :ivar machine: what it said last.
    :ivar capability: what KVM on this host can do.
    """

    def __init__(self, monitor: Monitor, process: Process, machine: Machine) -> None:
        self.monitor = monitor
        self.process = process
        self.machine = machine
        self.capability = kvm.pre_fault_capability(process)
        self._maps: tuple[Mapping, ...] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, qmp: str, pid: int | None = None) -> AsyncIterator[Session]:
        """Connect to a QMP socket and identify the process behind it.

        :param qmp: as :meth:`qemu_prefault.monitor.Monitor.connect` takes it.
        :param pid: QEMU's process id where the socket cannot tell it.
        :raise QemuPrefaultError: see :mod:`qemu_prefault.monitor`, :mod:`qemu_prefault.process`.
        """
        async with Monitor.connect(qmp) as monitor:
            machine = await read_machine(monitor)
            threads = [vcpu.thread_id for vcpu in machine.vcpus]
            yield cls(monitor, _identify(monitor, pid, threads), machine)

    async def refresh(self) -> Machine:
        """Ask QEMU again what it looks like; returns :attr:`machine`."""
        self.machine = await read_machine(self.monitor)
        self._maps = None
        return self.machine

    async def dirty_limit(self) -> bool:
        """Whether a vCPU dirty-rate limit is in force; it logs dirty pages."""
        try:
            return bool(await self.monitor.execute("query-vcpu-dirty-limit"))
        except CommandError:  # no such command, or no dirty ring
            return False

    def backing(self, section: Section) -> Backing:
        """What the section is made of; the mapping of its first byte speaks for all."""
        mapping = self._mapping(section)
        return Backing(backing_of(mapping, section.page_size), not mapping.shared)

    def allocated(self, section: Section) -> int:
        """Bytes that a shared backing has allocated already, mapped or not; 0 if unknown."""
        mapping = self._mapping(section)
        if not mapping.shared:
            return 0
        name = f"{mapping.start:x}-{mapping.end:x}"
        try:
            return os.stat(f"/proc/{self.process.pid}/map_files/{name}").st_blocks * 512
        except OSError:  # needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE
            return 0

    def _mapping(self, section: Section) -> Mapping:
        if self._maps is None:
            self._maps = self.process.maps()
        return mappings_of(self._maps, section.hva, section.size)[0]

    async def vcpu_threads(self, wanted: Sequence[int], needs_fds: bool) -> list[VcpuThread]:
        """The vCPUs to work with, each with its thread and KVM's file descriptor for it.

        KVM numbers vCPUs by APIC id, QEMU by index; the CPU object knows both.

        :param wanted: indexes; empty: all of them.
        :raise InputError: an index names no vCPU. :raise FailedError: a vCPU has no descriptor.
        """
        known = {vcpu.index: vcpu for vcpu in self.machine.vcpus}
        if missing := [index for index in wanted if index not in known]:
            raise InputError(
                f"there is no vCPU {missing[0]}", f"there are: {', '.join(map(str, sorted(known)))}"
            )
        chosen = [known[index] for index in (wanted or sorted(known))]
        tids = thread_map(self.process)
        if not needs_fds:
            return [VcpuThread(tids[v.thread_id], -1, None, v.node, index=v.index) for v in chosen]
        fds = self.process.kvm_fds().vcpus
        if not fds:
            raise UnsupportedError(
                f"QEMU (pid {self.process.pid}) has no KVM vCPUs",
                "start it with -accel kvm",
                code="not-kvm",
            )
        ids = await asyncio.gather(
            *(self.monitor.execute("qom-get", path=v.qom_path, property="apic-id") for v in chosen)
        )
        threads = []
        for vcpu, vcpu_id in zip(chosen, ids, strict=True):
            if not isinstance(vcpu_id, int) or vcpu_id not in fds:
                raise FailedError(
                    f"QEMU (pid {self.process.pid}) has no KVM descriptor for vCPU {vcpu.index}",
                    "it may just be plugged or unplugged: try again",
                )
            tid, fd = tids[vcpu.thread_id], fds[vcpu_id]
            thread = VcpuThread(tid, fd, vcpu_id, vcpu.node, vcpu.qom_path, vcpu.index)
            threads.append(thread)
        return threads

    @contextlib.contextmanager
    def vcpu_stats(self, threads: Sequence[VcpuThread]) -> Iterator[list[kvm.BinaryStats] | None]:
        """The vCPUs' counters, to be read without asking QEMU; None where that cannot be.

        Only for kernels that have the prefault ioctl: before eed3013faa40 (v6.5) who read
        them after QEMU's end read memory that was freed.
        """
        with contextlib.ExitStack() as stack:
            stats = []
            try:
                numbers = self.process.kvm_fds().vcpu_stats
                for thread in threads:
                    if thread.vcpu_id is not None and thread.vcpu_id in numbers:
                        fd = self.process.take_fd(numbers[thread.vcpu_id])
                        stack.callback(os.close, fd)
                        stats.append(kvm.BinaryStats(fd))
            except (OSError, QemuPrefaultError):
                stats = []
            yield stats if len(stats) == len(threads) else None

    async def prefault(
        self,
        policy: Policy | None = None,
        *,
        cont: bool = False,
        incoming: bool = False,
        on_ready: Callable[[], Awaitable[None]] | None = None,
        dry_run: bool = False,
        agent: str = "auto",
    ) -> Report:
        """Prefault this guest; see :class:`qemu_prefault.engine.Engine` for what is raised.

        :param incoming: it is yet to arrive (``-incoming``): wait for it, and prefault it
            before it starts.
        :param on_ready: awaited as soon as an incoming guest may come.
        """
        from .engine import Engine  # noqa: PLC0415  (it builds on this module)

        return await Engine(
            self,
            policy or Policy(),
            cont=cont,
            incoming=incoming,
            agent=agent,
            on_ready=on_ready,
        ).run(dry_run)


def _identify(monitor: Monitor, pid: int | None, thread_ids: Sequence[int]) -> Process:
    if monitor.domain_uuid is None:
        return identify(monitor.peer_pid, pid, thread_ids)
    # libvirt's connection may lead to another host, where thread ids mean something else.
    try:
        process = identify(None, pid, thread_ids)
        if monitor.domain_uuid in process.arguments():
            return process
    except UnsupportedError:
        pass
    raise UnsupportedError(
        f"the QEMU of domain {monitor.domain_uuid} is not on this host",
        "run this on the host it runs on, as root",
        code="other-host",
    )
