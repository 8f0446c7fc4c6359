# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the state of the plugin in a domain, for ``libvirt status``."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agents.plugin import Control, find_control_socket
from ..engine.report import SCHEMA
from ..errors import QemuPrefaultError
from .connection import definitions
from .domain_xml import Loaded, describe, loaded
from .find_qemu import find_qemu
from .install import is_current


@dataclass(frozen=True, slots=True)
class DomainStatus:
    """The plugin's state in a domain's definition and in its running QEMU.

    :ivar domain: The domain's name.
    :ivar in_xml: The plugin's path and options in the domain's definition, or None if the
        definition does not load the plugin.
    :ivar present: Whether the plugin's file exists on this host.
    :ivar current: Whether the plugin's file is identical to the plugin of this qemu-prefault.
    :ivar running: Whether the domain is running.
    :ivar plugin: The status that the plugin in a running QEMU reports, or None.
    :ivar problem: The reason why a running QEMU has no plugin status, or an empty string.
    """

    domain: str
    in_xml: Loaded | None
    present: bool
    current: bool
    running: bool
    plugin: dict[str, Any] | None
    problem: str

    @property
    def enabled(self) -> bool:
        return self.in_xml is not None

    def to_json(self) -> dict[str, Any]:
        found = self.in_xml
        return {
            "schema": SCHEMA,
            "domain": self.domain,
            "enabled": self.enabled,
            "path": found.path if found else None,
            "options": list(found.options) if found else [],
            "installed": self.present,
            "current": self.current,
            "running": self.running,
            "plugin": self.plugin,
            "problem": self.problem or None,
        }


def read_domain_status(domain: str, uri: str | None = None) -> DomainStatus:
    """Read the domain's definition, and query the plugin if the domain is running.

    :param domain: A name or a UUID. If it is ``-``, the function reads XML from stdin.
    :param uri: The URI of the libvirt connection, or None for the default URI.
    :raises QemuPrefaultError: If the domain does not exist, or if libvirt does not respond.
    """
    if domain == "-":
        xml, running = sys.stdin.buffer.read(), False
    else:
        known = definitions(uri)
        xml, running = known.read(domain), known.running(domain)
    about = describe(xml)
    found = loaded(xml)
    present = current = False
    if found is not None:
        present = Path(found.path).exists()
        current = present and is_current(Path(found.path))
    plugin, problem = _ask(about.name, about.uuid) if running else (None, "")
    return DomainStatus(about.name or domain, found, present, current, running, plugin, problem)


def _ask(name: str, uuid: str) -> tuple[dict[str, Any] | None, str]:
    try:
        process = find_qemu(name, uuid)
        socket = find_control_socket(process)
        if socket is None:
            return None, (
                "running without the plugin; QEMU loads the plugin only when the domain starts"
            )

        async def ask() -> dict[str, Any]:
            async with Control.open(socket, process.pid) as control:
                return await control.status()

        return asyncio.run(ask()), ""
    except QemuPrefaultError as error:
        return None, f"the plugin's status could not be read: {error.cause}"
