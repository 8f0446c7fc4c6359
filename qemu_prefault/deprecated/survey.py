# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu_prefault.survey`` module of version 0.1.

Use :func:`qemu_prefault.ram_map` and :func:`qemu_prefault.counters` instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields

import qemu_prefault
from qemu_prefault.cli.format import counters_header, counters_line, ram_map_lines
from qemu_prefault.engine import inspect
from qemu_prefault.engine.inspect import VCPU_COUNTERS, MappedSection
from qemu_prefault.qemu.monitor import Monitor

__all__ = [
    "VCPU_COUNTERS",
    "Counters",
    "MappedSection",
    "RamMap",
    "counters",
    "counters_header",
    "ram_map",
]

warnings.warn(
    "qemu_prefault.survey is deprecated and will be removed after version 0.2. "
    "Use qemu_prefault.ram_map() and qemu_prefault.counters()",
    DeprecationWarning,
    stacklevel=2,
)


class RamMap(inspect.RamMap):
    """A RAM map with the :meth:`lines` method of version 0.1."""

    def lines(self) -> Iterator[str]:
        """Yield the lines that ``qemu-prefault map`` prints."""
        return ram_map_lines(self)


class Counters(inspect.Counters):
    """Counters with the :meth:`lines` method of version 0.1."""

    def lines(self) -> Iterator[str]:
        """Yield the line that ``qemu-prefault stats`` prints."""
        return counters_line(self)


async def ram_map(qmp: str, pid: int | None = None) -> RamMap:
    """Return the RAM map of the QEMU at a QMP socket."""
    async with qemu_prefault.connect(qmp, pid) as vm:
        found = await inspect.ram_map(vm)
    return RamMap(*(getattr(found, field.name) for field in fields(found)))


async def counters(monitor: Monitor) -> Counters:
    """Return KVM's counters, which the ``query-stats`` QMP command reports."""
    found = await inspect.counters(monitor)
    return Counters(found.stage2, found.vcpus)
