# SPDX-License-Identifier: GPL-2.0-or-later
"""Choose the agent that issues the system calls inside QEMU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import Code, UnsupportedError
from ..host.procfs import Process
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import Monitor
from .base import Agent, Limits, VcpuThread
from .injector import choose_threads
from .plugin import PluginAgent, find_control_socket
from .ptrace import PtraceAgent
from .qmp import QmpAgent, offers_command


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen kind of agent.

    :ivar name: ``plugin``, ``qmp`` or ``attach``.
    :ivar socket: The plugin's control socket, or None for the other agents.
    """

    name: str
    socket: Path | None = None

    def choose_threads(
        self, process: Process, threads: Sequence[VcpuThread]
    ) -> Sequence[VcpuThread]:
        """Return the vCPUs that the agent uses. An agent that starts threads uses a subset.

        :raises RefusedError: As for :func:`~qemu_prefault.agents.injector.choose_threads`.
        """
        if self.name == "qmp":
            return threads
        or_else = "start fewer threads in QEMU" if self.name == "plugin" else "use the plugin agent"
        return choose_threads(process, threads, or_else)

    def make(
        self,
        process: Process,
        monitor: Monitor,
        sections: Callable[[], Sequence[MemorySection]],
        threads: Sequence[VcpuThread],
        chunk_bytes: int | None,
    ) -> Agent:
        """Return a new agent of this kind, which is not started yet.

        :param sections: See :class:`QmpAgent`.
        :param chunk_bytes: Maximum bytes that one system call processes, or None for the default.
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
    """Choose an agent for a QEMU.

    ``auto`` chooses the plugin if QEMU has loaded it, else QEMU's own command if it exists, else
    attach.

    :param wanted: ``auto``, ``attach``, ``plugin`` or ``qmp``.
    :param kvm: Whether the guest runs under KVM.
    :raises UnsupportedError: The wanted agent is not available in this QEMU.
    """
    socket = find_control_socket(process) if wanted in ("auto", "plugin") else None
    if socket is not None:
        return Selection("plugin", socket)
    if wanted in ("auto", "qmp") and kvm and await offers_command(monitor):
        return Selection("qmp")
    if wanted == "qmp":
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has no x-kvm-prefault-memory, or does not use KVM",
            "use a QEMU that was built with patches/qemu (make qemu), or use --agent attach, which "
            "needs no patch",
            code=Code.NO_QMP_COMMAND,
        )
    if wanted == "plugin":
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has no qemu-prefault plugin",
            "start QEMU with `qemu-prefault run -- qemu-system-x86_64 …`, or with "
            '-plugin "$(qemu-prefault plugin-path)", or use --agent attach, which needs no plugin',
            code=Code.NO_PLUGIN,
        )
    return Selection("attach")
