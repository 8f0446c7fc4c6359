# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the value types and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import qemu_prefault

if TYPE_CHECKING:
    from ..api import Dial, Monitor, Vm

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
#: Prefix of an address that names a libvirt domain instead of a socket.
LIBVIRT = "libvirt:"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


# --- values ---


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(0x[0-9a-f]{1,16}|[0-9]{1,20})([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        return None
    return int(match[1], 16 if match[1].startswith("0x") else 10) << UNITS[match[2]]


def size_type(text: str) -> int:
    """Parse a size such as ``0x1000`` or ``512M``, and return it in bytes."""
    number = _bytes(text)
    if number is None:
        raise click.BadParameter(f"{text!r} is not a size such as 65536, 0x10000, 512M or 2G")
    return number


def range_type(text: str) -> tuple[int, int]:
    """Parse ``GPA+SIZE``, and return the start address and the size in bytes."""
    start, _, length = text.partition("+")
    first, count = _bytes(start), _bytes(length)
    if first is None or not count or first + count > 1 << 52:
        raise click.BadParameter(f"{text!r} is not GPA+SIZE, for example 0x100000000+512M or 4G+1G")
    return first, count


def index_list_type(text: str) -> tuple[int, ...]:
    """Parse a list of indexes, for example ``0,2-3`` as (0, 2, 3)."""
    found: dict[int, None] = {}
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{text!r} is not a list of vCPUs such as 0,2-3")
        found.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return tuple(found)


# --- options ---

qmp_option = click.option(
    "--qmp",
    metavar="SOCK",
    help="QEMU's QMP socket, as a path or HOST:PORT. QEMU serves one client at a time.",
)
domain_option = click.option(
    "--domain",
    metavar="NAME",
    help="Name of a libvirt domain, for use instead of --qmp. libvirt forwards the QMP commands.",
)
pid_option = click.option("--pid", type=click.IntRange(1), help="QEMU's process id.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks of errors.")


def monitor_address(qmp: str | None, domain: str | None) -> str | None:
    """Return the monitor's address from the --qmp and --domain values.

    :returns: A socket address or ``libvirt:DOMAIN``, or None if both values are empty.
    :raises click.UsageError: If both options are used.
    """
    if qmp and domain:
        raise click.UsageError("specify either --qmp SOCK or --domain NAME")
    return f"{LIBVIRT}{domain}" if domain else qmp


def required_address(qmp: str | None, domain: str | None) -> str:
    """Return the monitor's address, and require --qmp or --domain.

    :returns: A socket address or ``libvirt:DOMAIN``.
    :raises click.UsageError: If neither option is used, or if both are used.
    """
    address = monitor_address(qmp, domain)
    if not address:
        raise click.UsageError("specify --qmp SOCK (QEMU's QMP socket) or --domain NAME")
    return address


def connect(
    address: str, pid: int | None = None, *, loading: bool = False
) -> AbstractAsyncContextManager[Vm]:
    """Return a context manager that connects to QEMU and finds its process.

    :param address: An address that :func:`monitor_address` returned.
    :param loading: Whether QEMU may be loading a guest.
    """
    return qemu_prefault.connect(address, pid, dial=_dial(address), loading=loading)


def connect_monitor(address: str) -> AbstractAsyncContextManager[Monitor]:
    """Return a context manager that connects to QEMU's monitor.

    :param address: An address that :func:`monitor_address` returned.
    """
    return qemu_prefault.Monitor.connect(address, dial=_dial(address))


def _dial(address: str) -> Dial | None:
    if not address.startswith(LIBVIRT):
        return None
    from ..libvirt.qmp_proxy import dial  # noqa: PLC0415

    return partial(dial, address.removeprefix(LIBVIRT))
