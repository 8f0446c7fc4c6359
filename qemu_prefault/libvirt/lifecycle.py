# SPDX-License-Identifier: GPL-2.0-or-later
"""``virsh start --paused``, ``restore --paused`` and ``migrate --suspend``, with what follows.

Each leaves libvirt with a guest whose RAM is there and whose vCPUs do not run: the best moment.
Then it is prefaulted, and resumed, whatever came of the prefault: who asked for a guest gets
one. If this process is killed in between, its guard resumes the guest (see engine/resume_guard.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..agents.base import Limits, OrphanCleanup
from ..agents.plugin import batch_threads
from ..agents.ptrace import helper_threads
from ..engine.executor import Progress
from ..engine.options import Options
from ..engine.report import Report
from ..engine.resume_guard import ResumeGuard
from ..engine.run import prefault
from .connection import connect, errors, lookup, module
from .domain_xml import describe
from .qmp_proxy import connect_vm

if TYPE_CHECKING:
    import libvirt


async def start(name: str, uri: str | None, options: Options, on_progress: Progress) -> Report:
    """Start a domain, or its managed save image, paused; prefault it; let it run.

    :raise QemuPrefaultError: it did not start, or runs and is not prefaulted.
    """
    libvirt = module()
    domain = lookup(connect(uri), name)
    with errors():
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    return await _prefault_and_resume(domain, options, on_progress)


async def restore(file: str, uri: str | None, options: Options, on_progress: Progress) -> Report:
    """The same with a file of ``virsh save``."""
    libvirt = module()
    connection = connect(uri)
    with errors():
        xml = connection.saveImageGetXMLDesc(file, 0)
        connection.restoreFlags(file, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
    domain = lookup(connection, describe(xml.encode()).uuid)
    return await _prefault_and_resume(domain, options, on_progress)


async def migrate(
    name: str,
    source: str,
    uri: str | None,
    options: Options,
    on_progress: Progress,
    *,
    migrate_uri: str | None = None,
    persistent: bool = False,
    undefine: bool = False,
) -> Report:
    """Fetch a domain from another host, live; prefault it here, and let it run.

    It is called at the destination, because only there QEMU's process can be reached.

    :param source: libvirt's URI of the host it runs on.
    """
    libvirt = module()
    there, here = connect(source), connect(uri)
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PAUSED
    flags |= libvirt.VIR_MIGRATE_PERSIST_DEST if persistent else 0
    flags |= libvirt.VIR_MIGRATE_UNDEFINE_SOURCE if undefine else 0
    parameters = {libvirt.VIR_MIGRATE_PARAM_URI: migrate_uri} if migrate_uri else {}
    domain = lookup(there, name)
    with errors():
        arrived = domain.migrate3(here, parameters, flags)
    return await _prefault_and_resume(arrived, options, on_progress)


async def _prefault_and_resume(
    domain: libvirt.virDomain, options: Options, on_progress: Progress
) -> Report:
    uuid = domain.UUIDString()
    resumed = False

    def resume() -> None:
        nonlocal resumed
        if not resumed:
            resumed = True
            with errors():
                domain.resume()

    try:
        async with connect_vm(uuid) as vm:
            with ResumeGuard(vm.monitor.fileno(), _cleanup(vm.process.pid)):
                try:
                    return await prefault(vm, options, on_progress=on_progress)
                finally:
                    resume()
    finally:
        resume()


def _cleanup(pid: int) -> OrphanCleanup:
    limits = Limits()
    return OrphanCleanup(
        stop_helpers=lambda: None,  # the helpers notice by themselves that we are gone
        helpers_gone=lambda: not helper_threads(pid) and not batch_threads(pid),
        timeout=limits.stuck + limits.dead_man,
    )
