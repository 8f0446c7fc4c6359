# SPDX-License-Identifier: GPL-2.0-or-later
"""The public API; everything here is exported by :mod:`qemu_prefault` itself.

The 90 % case, blocking::

    report = qemu_prefault.prefault("/run/vm.qmp")

and all of it, asynchronous::

    async with qemu_prefault.connect("/run/vm.qmp") as vm:
        options = qemu_prefault.Options(max_downtime=0.1, cont=True)
        report = await qemu_prefault.prefault_async(vm, options, on_progress=print)

Every error that leaves these functions is a :class:`~qemu_prefault.errors.QemuPrefaultError`.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

from .agents.base import VcpuThread
from .agents.launch import check_plugin_options, replace_by
from .agents.plugin import plugin_path
from .engine import run
from .engine.executor import Progress
from .engine.follow import follow
from .engine.inspect import VCPU_COUNTERS, Counters, MappedSection, RamMap, counters, ram_map
from .engine.options import AgentChoice, Options, Populate
from .engine.probe import Finding, Findings, probe, probe_process
from .engine.report import SCHEMA, ByteSums, Report, RunWarning, Seconds, SectionReport
from .engine.run import OnReady
from .engine.vm import Vm
from .host.kvm import Stage2Leaves, describe_errno, pre_fault_here
from .qemu.dial import Dial
from .qemu.monitor import EventStream, Monitor

__all__ = [
    "SCHEMA",
    "VCPU_COUNTERS",
    "AgentChoice",
    "ByteSums",
    "Counters",
    "Dial",
    "EventStream",
    "Finding",
    "Findings",
    "MappedSection",
    "Monitor",
    "OnReady",
    "Options",
    "Populate",
    "Progress",
    "RamMap",
    "Report",
    "RunWarning",
    "Seconds",
    "SectionReport",
    "Stage2Leaves",
    "VcpuThread",
    "Vm",
    "check_plugin_options",
    "connect",
    "counters",
    "describe_errno",
    "follow",
    "plugin_path",
    "pre_fault_here",
    "prefault",
    "prefault_async",
    "probe",
    "probe_process",
    "ram_map",
    "replace_by",
]


def connect(
    qmp: str, pid: int | None = None, *, dial: Dial | None = None
) -> AbstractAsyncContextManager[Vm]:
    """Connect to a QEMU's QMP socket and identify the process behind it, for the block.

    :param qmp: path of a UNIX socket (``unix:PATH`` too), or ``HOST:PORT`` (``tcp:HOST:PORT``
        too). QEMU serves one client at a time on each.
    :param pid: QEMU's process id where the socket cannot tell it.
    :param dial: makes the connection instead; ``qmp`` is only a name then.
    :raises QemuPrefaultError: there is no QMP to be had, or it is not that process's.
    """
    return Vm.connect(qmp, pid, dial)


async def prefault_async(
    vm: Vm,
    options: Options | None = None,
    *,
    on_progress: Progress | None = None,
    on_ready: OnReady | None = None,
) -> Report:
    """Prefault a connected guest.

    :param on_progress: called with the phase (``populate``, ``prefault``), bytes done, and bytes
        in all.
    :param on_ready: awaited as soon as an incoming guest may come.
    :returns: what was done; ``report.exit_status`` is PARTIAL if some bytes are not accounted for.
    :raises UnsupportedError, RefusedError: nothing was touched.
    :raises FailedError: something broke; the guest's run state is as it was found.
    """
    return await run.prefault(
        vm,
        options or Options(),
        on_ready=on_ready,
        on_progress=on_progress or (lambda phase, done, total: None),
    )


def prefault(
    target: str,
    options: Options | None = None,
    *,
    pid: int | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Prefault the guest behind a QMP socket; blocks until it is done.

    :param target: as :func:`connect` takes it.
    :param on_progress: as :func:`prefault_async` calls it.
    :raises QemuPrefaultError: as :func:`connect` and :func:`prefault_async`.
    """

    async def main() -> Report:
        async with connect(target, pid) as vm:
            return await prefault_async(vm, options, on_progress=on_progress)

    return asyncio.run(main())
