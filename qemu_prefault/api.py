# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions and classes of the public API.

:mod:`qemu_prefault` exports every name in this module.

Most callers need one blocking call::

    report = qemu_prefault.prefault("/run/vm.qmp")

The asynchronous functions give access to the connection and to progress reports::

    async with qemu_prefault.connect("/run/vm.qmp") as vm:
        options = qemu_prefault.Options(max_downtime=0.1, cont=True)
        report = await qemu_prefault.prefault_async(vm, options, on_progress=print)

Addresses and sizes are in bytes, and times are in seconds. Every error that these functions raise
is a :class:`~qemu_prefault.errors.QemuPrefaultError`.
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
from .qemu.events import EventStream
from .qemu.monitor import Monitor

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
    qmp: str, pid: int | None = None, *, dial: Dial | None = None, loading: bool = False
) -> AbstractAsyncContextManager[Vm]:
    """Return a context manager that connects to QEMU over QMP.

    The context manager also finds QEMU's process. It closes the connection when the ``async with``
    block ends. QEMU serves one client at a time on each QMP socket.

    :param qmp: The path of a UNIX socket (``PATH`` or ``unix:PATH``), or a TCP address
        (``HOST:PORT`` or ``tcp:HOST:PORT``).
    :param pid: QEMU's process id. This argument is needed only for a socket that does not report
        the process id, such as a TCP socket.
    :param dial: A function that opens the connection, or None. If a function is passed, messages
        use ``qmp`` as the name of the connection, and nothing else uses ``qmp``.
    :param loading: Whether QEMU may be loading a guest, for example with ``-incoming``. QEMU may
        then reply late, and the function waits up to 30 s for each reply. Otherwise, QEMU must
        reply to all first queries within 6 s.
    :returns: An asynchronous context manager that yields a :class:`Vm`.
    :raises InputError: If the address is malformed, or if the socket does not exist.
    :raises MonitorBusyError: If another client is using the socket.
    :raises MonitorError: If the peer does not respond, or if it is not a QMP server.
    :raises RefusedError: If the process behind the socket is not QEMU, or if ``pid`` is the id of
        another process.
    :raises UnsupportedError: If QEMU runs on another host or in another pid namespace.
    :raises GoneError: If QEMU's process does not exist.
    """
    return Vm.connect(qmp, pid, dial, loading=loading)


async def prefault_async(
    vm: Vm,
    options: Options | None = None,
    *,
    on_progress: Progress | None = None,
    on_ready: OnReady | None = None,
) -> Report:
    """Prefault the guest of a connected QEMU.

    :param vm: The connection to QEMU that :func:`connect` yields.
    :param options: The memory to prefault, and the method. If None, the function uses the defaults
        of the command line, which prefault all RAM.
    :param on_progress: A function that the run calls with three arguments. They are the phase
        (``"populate"`` or ``"prefault"``), the completed bytes in this phase, and the total bytes
        of this phase.
    :param on_ready: A coroutine function that the run awaits once, when QEMU is ready for the
        incoming migration. The run ignores this function unless ``options.incoming`` is set.
    :returns: The report of the run. ``report.exit_status`` is ``PARTIAL`` if some of the requested
        bytes were not prefaulted or could not be verified. Otherwise it is ``VERIFIED``.
    :raises UnsupportedError: If this host, kernel or QEMU cannot prefault. In this case, the run
        has changed neither the guest nor the host.
    :raises RefusedError: If prefaulting now would harm the guest or the host, or if another client
        migrates the guest during the run.
    :raises InputError: If an option names an object that this guest does not have, for example a
        vCPU.
    :raises FailedError: If a step failed. The guest's run state is the same as before the run.
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
    """Prefault the guest of the QEMU at a QMP socket, and return the report.

    This function runs its own event loop. If a loop is already running, await
    :func:`prefault_async` instead.

    :param target: The address of the QMP socket. See the ``qmp`` parameter of :func:`connect`.
    :param options: See :func:`prefault_async`.
    :param pid: See :func:`connect`.
    :param on_progress: See :func:`prefault_async`.
    :returns: The report of the run. See :func:`prefault_async`.
    :raises QemuPrefaultError: If :func:`connect` or :func:`prefault_async` raises an error.
    """

    async def main() -> Report:
        loading = options is not None and options.incoming
        async with connect(target, pid, loading=loading) as vm:
            return await prefault_async(vm, options, on_progress=on_progress)

    return asyncio.run(main())
