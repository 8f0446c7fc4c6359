# SPDX-License-Identifier: GPL-2.0-or-later
"""``virsh start --paused``, ``restore --paused`` and ``migrate --suspend``, with what follows.

Each leaves libvirt with a guest whose RAM is there and whose vCPUs do not run: the best moment.
Then it is prefaulted, and resumed, whatever came of the prefault: who asked for a guest gets
one. If this process is killed in between, its guard resumes the guest (see guard.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..agents import DeathOrders, Limits
from ..agents.attach import helper_threads
from ..agents.plugin import batch_threads
from ..engine import Engine
from ..guard import ResumeGuard
from ..plan import Policy
from ..report import Report
from ..session import Session
from ..work import Progress
from .connection import connect, errors, lookup, module

if TYPE_CHECKING:
    import libvirt


async def start(name: str, uri: str | None, policy: Policy, on_progress: Progress) -> Report:
    """Start a domain, or its managed save image, paused; prefault it; let it run.

    :raise QemuPrefaultError: it did not start, or runs and is not prefaulted.
    """
    libvirt = module()
    domain = lookup(connect(uri), name)
    with errors():
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    return await _prefault_and_resume(domain, policy, on_progress)


async def restore(file: str, uri: str | None, policy: Policy, on_progress: Progress) -> Report:
    """The same with a file of ``virsh save``."""
    libvirt = module()
    connection = connect(uri)
    with errors():
        xml = connection.saveImageGetXMLDesc(file, 0)
        connection.restoreFlags(file, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
    from .domain_xml import describe  # noqa: PLC0415

    domain = lookup(connection, describe(xml.encode()).uuid)
    return await _prefault_and_resume(domain, policy, on_progress)


async def migrate(
    name: str,
    source: str,
    uri: str | None,
    policy: Policy,
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
    return await _prefault_and_resume(arrived, policy, on_progress)


async def _prefault_and_resume(
    domain: libvirt.virDomain, policy: Policy, on_progress: Progress
) -> Report:
    address = f"libvirt:{domain.UUIDString()}"
    resumed = False

    def resume() -> None:
        nonlocal resumed
        if not resumed:
            resumed = True
            with errors():
                domain.resume()

    try:
        async with Session.open(address) as session:
            with ResumeGuard(session.monitor.fileno(), _orders(session.process.pid)):
                try:
                    return await Engine(session, policy, on_progress=on_progress).run()
                finally:
                    resume()
    finally:
        resume()


def _orders(pid: int) -> DeathOrders:
    limits = Limits()
    return DeathOrders(
        send_away=lambda: None,  # the helpers notice by themselves that we are gone
        gone=lambda: not helper_threads(pid) and not batch_threads(pid),
        patience=limits.stuck + limits.dead_man,
    )
