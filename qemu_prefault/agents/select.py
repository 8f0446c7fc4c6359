# SPDX-License-Identifier: GPL-2.0-or-later
"""Choose the agent that issues the system calls inside QEMU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import Code, UnsupportedError
from ..host.cpu_quota import cpu_quota
from ..host.procfs import Process
from ..qemu.memory_map import MemorySection
from ..qemu.monitor import Monitor
from .base import Agent, Limits, VcpuThread
from .injector import check_untraced, choose_threads
from .plugin import PluginAgent, find_control_socket
from .ptrace import PtraceAgent
from .qmp import QmpAgent, offers_command


@dataclass(frozen=True, slots=True)
class Selection:
    """The kind of agent that :func:`select_agent` has chosen.

    :ivar name: ``plugin``, ``qmp`` or ``attach``.
    :ivar socket: The plugin's control socket, or None if the kind is not ``plugin``.
    """

    name: str
    socket: Path | None = None

    def choose_threads(
        self, process: Process, threads: Sequence[VcpuThread], *, force: bool
    ) -> Sequence[VcpuThread]:
        """Return the vCPUs that the agent uses.

        The attach agent and the plugin start threads in QEMU, so they use only some of the vCPUs.

        :param force: Whether to start one thread if QEMU's pids cgroup cannot be read.
        :raises RefusedError: If QEMU's limits allow too few threads (code ``no-tasks``), or if
            QEMU's pids cgroup cannot be read (code ``hidden-cgroup``).
        """
        if self.name == "qmp":
            return threads
        or_else = "start fewer threads in QEMU" if self.name == "plugin" else "use the plugin agent"
        return choose_threads(process, threads, or_else, force=force)

    async def check_untraced(self, process: Process, threads: Sequence[VcpuThread]) -> None:
        """Check that no other process traces QEMU, if the agent must trace it.

        :raises UnsupportedError: If another process traces QEMU.
        """
        if self.name == "attach":
            await check_untraced(process, threads)

    def warnings(self, process: Process) -> dict[str, str]:
        """Return a map from codes to warnings about the agent's threads in QEMU."""
        quota = cpu_quota(process) if self.name == "attach" else None
        return {Code.CPU_QUOTA: quota.warning()} if quota and quota.rest_percent else {}

    def make(
        self,
        process: Process,
        monitor: Monitor,
        sections: Callable[[], Sequence[MemorySection]],
        threads: Sequence[VcpuThread],
        chunk_bytes: int | None,
    ) -> Agent:
        """Return a new agent of this kind, which the caller must start.

        :param sections: A function that returns the guest's memory sections, see :class:`QmpAgent`.
        :param chunk_bytes: The maximum number of bytes that one system call processes, or None for
            the default.
        """
        limits = Limits()
        if chunk_bytes:
            limits = replace(limits, chunk_bytes=chunk_bytes)
        if self.name == "qmp":
            return QmpAgent(process, monitor, sections, threads, limits)
        if self.socket is not None:
            return PluginAgent(process, self.socket, threads, limits)
        return PtraceAgent(process, threads, limits)


async def select_agent(wanted: str, process: Process, monitor: Monitor, *, kvm: bool) -> Selection:
    """Return the kind of agent to use for a QEMU process.

    If ``wanted`` is ``auto``, the function chooses the first agent in this list that can be used:

    * the plugin agent, if QEMU has loaded the plugin
    * the qmp agent, if the guest runs under KVM and QEMU has the ``x-kvm-prefault-memory`` command
    * the attach agent

    :param wanted: ``auto``, ``attach``, ``plugin`` or ``qmp``.
    :param kvm: Whether the guest runs under KVM.
    :raises UnsupportedError: If QEMU does not support the requested agent.
    """
    socket = find_control_socket(process) if wanted in ("auto", "plugin") else None
    if socket is not None:
        return Selection("plugin", socket)
    if wanted in ("auto", "qmp") and kvm and await offers_command(monitor):
        return Selection("qmp")
    if wanted == "qmp":
        raise UnsupportedError(
            f"QEMU (pid {process.pid}) has no x-kvm-prefault-memory QMP command, or does not use "
            "KVM",
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
