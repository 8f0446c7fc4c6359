# SPDX-License-Identifier: GPL-2.0-or-later
"""Connect to one QEMU, for the public API and the commands.

::

    async with Vm.connect("/run/vm.qmp") as vm:
        print(vm.state.status, vm.process.pid)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..agents.base import VcpuThread
from ..errors import (
    Code,
    CommandError,
    FailedError,
    InputError,
    PtraceDeniedError,
    QemuPrefaultError,
    UnsupportedError,
)
from ..host import kvm
from ..host.fds import kvm_fds, take_fd, vcpu_stats_link
from ..host.identify import identify
from ..host.mapped_file import is_disk_file, is_on_fuse
from ..host.mappings import MemoryMapping, backing_of, mappings_of
from ..host.memory_source import MemorySource, task_nodes
from ..host.procfs import Process, thread_map
from ..host.ptrace_access import ptrace_denied
from ..qemu.dial import Dial
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import PATIENT_SECONDS, Monitor
from ..qemu.queries import (
    LIBVIRT_STATE_SECONDS,
    VmState,
    read_vm_state,
    read_vm_state_in_time,
)

#: A function that reads QEMU's state within a time limit.
ReadState = Callable[[Monitor], Awaitable[VmState]]


@dataclass(frozen=True, slots=True)
class Backing:
    """The kind of memory behind a section, and whether its mapping is MAP_PRIVATE."""

    kind: str
    private: bool

    def __str__(self) -> str:
        if self.kind == "anonymous":
            return self.kind
        return f"{self.kind}, {'private' if self.private else 'shared'}"


class Vm:
    """A connection to one QEMU and its process, which :meth:`connect` opens.

    :ivar monitor: The QMP connection.
    :ivar process: QEMU's process.
    :ivar state: QEMU's state when it was last queried.
    :ivar capability: Whether KVM_PRE_FAULT_MEMORY can work on this host.
    """

    def __init__(
        self,
        monitor: Monitor,
        process: Process,
        state: VmState,
        read_state: ReadState = read_vm_state_in_time,
    ) -> None:
        self.monitor = monitor
        self.process = process
        self.state = state
        self.capability = kvm.pre_fault_capability(process)
        self._maps: tuple[MemoryMapping, ...] | None = None
        self._read_state = read_state

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        qmp: str,
        pid: int | None = None,
        dial: Dial | None = None,
        *,
        loading: bool = False,
    ) -> AsyncIterator[Vm]:
        """Connect to a QMP socket, and identify the QEMU process behind it.

        :param qmp: The socket's address. See :meth:`Monitor.connect`.
        :param pid: QEMU's process id. This argument is needed only if the socket does not identify
            QEMU.
        :param dial: A function that opens the connection. See :meth:`Monitor.connect`.
        :param loading: Whether QEMU may be loading a guest. QEMU then replies late.
        :raises QemuPrefaultError: If :meth:`Monitor.connect`,
            :func:`~qemu_prefault.qemu.queries.read_vm_state` or
            :func:`~qemu_prefault.host.identify.identify` raises an error.
        """
        timeout = PATIENT_SECONDS if loading else None
        async with Monitor.connect(qmp, dial=dial, command_timeout=timeout) as monitor:
            read_state: ReadState = read_vm_state_in_time
            if loading:
                read_state = read_vm_state
            elif dial is not None:
                read_state = partial(read_vm_state_in_time, seconds=LIBVIRT_STATE_SECONDS)
            state = await read_state(monitor)
            threads = [vcpu.thread_id for vcpu in state.vcpus]
            vm = cls(monitor, _identify(monitor, pid, threads), state, read_state)
            vm.state = vm._with_disk_files(state)
            yield vm

    async def refresh(self) -> VmState:
        """Read QEMU's state again, and return the new :attr:`state`.

        The time limit is the same as for :meth:`connect`.
        """
        self._maps = None
        self.state = self._with_disk_files(await self._read_state(self.monitor))
        return self.state

    def _with_disk_files(self, state: VmState) -> VmState:
        """Mark sections that are shared files on a disk, if /proc/PID/maps is readable."""
        try:
            sections = tuple(
                replace(section, disk_file=True)
                if section.skipped is None and is_disk_file(self.process, self._mapping(section))
                else section
                for section in state.sections
            )
        except UnsupportedError:  # a later step that must read this file raises the error
            return state
        return replace(state, sections=sections)

    async def dirty_limit(self) -> bool:
        """Return whether KVM logs dirty pages because of a vCPU dirty-rate limit."""
        try:
            return bool(await self.monitor.execute("query-vcpu-dirty-limit"))
        except CommandError:  # QEMU lacks the command, or the VM has no dirty ring
            return False

    def backing(self, section: MemorySection) -> Backing:
        """Return the backing of the mapping that contains a section's first byte."""
        mapping = self._mapping(section)
        return Backing(backing_of(mapping, section.page_size), not mapping.shared)

    def memory_source(self, section: MemorySection) -> MemorySource:
        """Return the source from which the host allocates a section's memory."""
        mapping = self._mapping(section)
        nodes = section.bound_nodes
        return MemorySource(
            self.process,
            mapping,
            section.page_size,
            task_nodes(self.process) if nodes is None else nodes,
            reserved=section.reserve is not False,
        )

    def allocated(self, section: MemorySection) -> int:
        """Return the bytes that a shared backing has allocated, or 0 if unknown.

        The result includes pages that QEMU has not mapped yet. It is 0 for a file on FUSE, because
        a server that hangs would block this process.
        """
        mapping = self._mapping(section)
        if not mapping.shared or is_on_fuse(self.process, mapping):
            return 0
        name = f"{mapping.start:x}-{mapping.end:x}"
        try:
            return os.stat(f"{self.process.proc}/map_files/{name}").st_blocks * 512
        except OSError:  # needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE
            return 0

    def _mapping(self, section: MemorySection) -> MemoryMapping:
        if self._maps is None:
            self._maps = self.process.maps()
        return mappings_of(self._maps, section.hva, section.size)[0]

    async def vcpu_threads(self, wanted: Sequence[int], needs_fds: bool) -> list[VcpuThread]:
        """Return the chosen vCPUs with their threads and KVM file descriptors.

        KVM identifies a vCPU by its APIC id. QEMU identifies a vCPU by its index. The vCPU's QOM
        object contains both numbers.

        :param wanted: The indexes of the chosen vCPUs. An empty sequence means all vCPUs.
        :param needs_fds: Whether the descriptors are needed. Populating does not need them.
        :raises InputError: If an index in ``wanted`` is not a vCPU's index.
        :raises UnsupportedError: If QEMU has no KVM vCPUs.
        :raises FailedError: If QEMU has no KVM descriptor for a chosen vCPU.
        """
        known = {vcpu.index: vcpu for vcpu in self.state.vcpus}
        if missing := [index for index in wanted if index not in known]:
            raise InputError(
                f"the guest has no vCPU {missing[0]}",
                f"its vCPUs are: {', '.join(map(str, sorted(known)))}",
            )
        chosen = [known[index] for index in (wanted or sorted(known))]
        tids = thread_map(self.process)
        if not needs_fds:
            return [VcpuThread(tids[v.thread_id], -1, None, v.node, index=v.index) for v in chosen]
        fds = kvm_fds(self.process).vcpus
        if not fds:
            raise UnsupportedError(
                f"QEMU (pid {self.process.pid}) has no KVM vCPUs",
                "start QEMU with -accel kvm",
                code=Code.NOT_KVM,
            )
        ids = await asyncio.gather(
            *(self.monitor.execute("qom-get", path=v.qom_path, property="apic-id") for v in chosen)
        )
        threads = []
        for vcpu, vcpu_id in zip(chosen, ids, strict=True):
            if not isinstance(vcpu_id, int) or vcpu_id not in fds:
                raise FailedError(
                    f"QEMU (pid {self.process.pid}) has no KVM descriptor for vCPU {vcpu.index}",
                    "run qemu-prefault again, because QEMU may be plugging or unplugging this vCPU",
                )
            tid, fd = tids[vcpu.thread_id], fds[vcpu_id]
            thread = VcpuThread(tid, fd, vcpu_id, vcpu.node, vcpu.qom_path, vcpu.index)
            threads.append(thread)
        return threads

    def take_fd(self, number: int) -> int:
        """Return a duplicate of QEMU's descriptor, which the caller must close.

        :raises PtraceDeniedError: If this process has no permission to trace QEMU.
        :raises GoneError: If QEMU has exited, or if QEMU has closed the descriptor.
        """
        try:
            return take_fd(self.process, number)
        except PtraceDeniedError:
            raise ptrace_denied(self.process) from None

    @contextlib.contextmanager
    def vcpu_stats(self, threads: Sequence[VcpuThread]) -> Iterator[list[kvm.BinaryStats] | None]:
        """Open the vCPUs' KVM counters for the block, to read them without QMP.

        Use this method only on kernels with the prefault ioctl. Before commit eed3013faa40 (v6.5),
        a read from such a descriptor after QEMU's exit accesses freed kernel memory.

        :returns: The counters in the order of the vCPUs, or None if they cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            stats = []
            try:
                numbers = kvm_fds(self.process).vcpu_stats
                for thread in threads:
                    if thread.vcpu_id is not None and thread.vcpu_id in numbers:
                        link = vcpu_stats_link(thread.vcpu_id)
                        fd = take_fd(self.process, numbers[thread.vcpu_id], link)
                        stack.callback(os.close, fd)
                        stats.append(kvm.BinaryStats(fd))
            except (OSError, QemuPrefaultError):
                stats = []
            yield stats if len(stats) == len(threads) else None


def _identify(monitor: Monitor, pid: int | None, thread_ids: Sequence[int]) -> Process:
    if monitor.vm_uuid is None:
        return identify(monitor.peer_pid, pid, thread_ids, monitor.peer)
    # ``dial`` may have connected to a QEMU on another host, whose thread ids mean nothing here.
    try:
        process = identify(None, pid, thread_ids)
        if monitor.vm_uuid in process.arguments():
            return process
    except UnsupportedError:
        pass
    raise UnsupportedError(
        f"the QEMU of domain {monitor.vm_uuid} is not on this host",
        "run qemu-prefault as root on the host on which that QEMU runs",
        code=Code.OTHER_HOST,
    )
