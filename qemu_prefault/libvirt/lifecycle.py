# SPDX-License-Identifier: GPL-2.0-or-later
"""Start, restore or migrate a domain, and prefault its guest before it runs.

At the request of these functions, libvirt leaves the guest paused, as with ``virsh start
--paused``, ``restore --paused`` and ``migrate --suspend``. The guest's RAM is then loaded, and its
vCPUs do not run. The functions prefault the guest and resume it. They also resume the guest if the
prefault fails. If this process is killed, the resume guard (engine/resume_guard.py) resumes the
guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..agents.base import Limits, OrphanCleanup
from ..agents.plugin import batch_threads
from ..agents.qemu_process import helper_threads
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
    """Start a domain or its managed save image, prefault the guest, and resume it.

    :param name: The domain's name, UUID or id.
    :param uri: The URI of the libvirt connection, or None for the default URI.
    :raises QemuPrefaultError: If the domain did not start, or if it runs but was not prefaulted.
    """
    libvirt = module()
    domain = lookup(connect(uri), name)
    with errors():
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    return await _prefault_and_resume(domain, options, on_progress)


async def restore(file: str, uri: str | None, options: Options, on_progress: Progress) -> Report:
    """Restore a domain from a file, prefault the guest, and resume it.

    :param file: The path of a file that ``virsh save`` wrote.
    :param uri: The URI of the libvirt connection, or None for the default URI.
    :raises QemuPrefaultError: See :func:`start`.
    """
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
    """Migrate a domain live to this host, prefault the guest, and resume it.

    Call this function on the destination host, because it prefaults the QEMU process there.

    :param source: The URI of libvirt on the host on which the domain runs.
    :param uri: The URI of libvirt on this host, or None for the default URI.
    :param migrate_uri: The URI to which the source sends the migration data, or None to let libvirt
        choose it.
    :param persistent: Whether to define the domain on this host as well.
    :param undefine: Whether to undefine the domain on the source host as well.
    :raises QemuPrefaultError: See :func:`start`.
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
        stop_helpers=lambda: None,  # helpers exit by themselves after this process has exited
        helpers_gone=lambda: not helper_threads(pid) and not batch_threads(pid),
        timeout=limits.stuck + limits.dead_man,
    )
