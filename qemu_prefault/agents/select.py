# SPDX-License-Identifier: GPL-2.0-or-later
"""Choose who issues the calls inside QEMU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import Code, UnsupportedError
from ..host.procfs import Process
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import Monitor
from .base import Agent, Limits, VcpuThread
from .plugin import PluginAgent, find_control_socket
from .ptrace import PtraceAgent, choose_threads
from .qmp import QmpAgent, offers_command


@dataclass(frozen=True, slots=True)
class Selection:
    """An agent that is chosen and not yet made.

    ``name``: ``plugin``, ``qmp`` or ``attach``. ``socket``: the plugin's control socket.
    """

    name: str
    socket: Path | None = None

    def choose_threads(
        self, process: Process, threads: Sequence[VcpuThread]
    ) -> Sequence[VcpuThread]:
        """Choose the vCPUs that the agent works with: all, unless each one costs QEMU a thread.

        :raises RefusedError: see :func:`~qemu_prefault.agents.ptrace.choose_threads`.
        """
        return choose_threads(process, threads) if self.name == "attach" else threads

    def make(
        self,
        process: Process,
        monitor: Monitor,
        sections: Callable[[], Sequence[MemorySection]],
        threads: Sequence[VcpuThread],
        chunk_bytes: int | None,
    ) -> Agent:
        """Make the agent; it starts nothing yet.

        :param sections: see :class:`QmpAgent`.
        :param chunk_bytes: most that one system call is asked for; None: the default.
        """
        limits = Limits()
        if chunk_bytes:
            limits = replace(limits, chunk_bytes=chunk_bytes)
        if self.name == "qmp":
            return QmpAgent(monitor, sections, threads, limits)
        if self.socket is not None:
            return PluginAgent(process, self.socket, threads, limits)
        return PtraceAgent(process, threads, limits)


async def select_agent(wanted: str, process: Process, monitor: Monitor, *, kvm: bool) -> Selection:
    """The plugin if it is there and not unwanted, else QEMU itself if it can, else attach.

    :param wanted: ``auto``, ``attach``, ``plugin`` or ``qmp``.
    :param kvm: whether the guest runs under KVM.
    :raises UnsupportedError: this QEMU does not have the wanted one.
    """
    socket = find_control_socket(process) if wanted in ("auto", "plugin") else None
    if socket is not None:
        return Selection("plugin", socket)
    if wanted in ("auto", "qmp") and kvm and await offers_command(monitor):
        return Selection("qmp")
    if wanted == "qmp":
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has no x-kvm-prefault-memory, or does not use KVM",
            "it takes a QEMU with patches/qemu (make qemu); --agent attach needs none",
            code=Code.NO_QMP_COMMAND,
        )
    if wanted == "plugin":
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has no qemu-prefault plugin",
            "start it by `qemu-prefault run -- qemu-system-x86_64 …`, or with "
            '-plugin "$(qemu-prefault plugin-path)"; --agent attach needs none',
            code=Code.NO_PLUGIN,
        )
    return Selection("attach")
