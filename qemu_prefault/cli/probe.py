# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault probe`` command, which checks whether prefaulting works."""

from __future__ import annotations

import sys

import click

import qemu_prefault

from .console import Printer, reporting, run_async
from .format import findings_lines
from .options import (
    connect,
    debug_option,
    domain_option,
    json_option,
    monitor_address,
    pid_option,
    qmp_option,
)


@click.command()
@qmp_option
@domain_option
@pid_option
@json_option
@debug_option
def probe(qmp: str | None, domain: str | None, pid: int | None, as_json: bool, debug: bool) -> None:
    """Check whether this host supports prefaulting, and suggest fixes for problems.

    With --domain, the command also checks what libvirt, AppArmor and SELinux allow, even if the
    domain is not running.
    """
    address = monitor_address(qmp, domain)
    if not address and not pid:
        raise click.UsageError("specify --qmp SOCK, --domain NAME or --pid PID")

    async def main() -> None:
        if domain:
            from ..libvirt.probe import probe_domain  # noqa: PLC0415

            findings = await probe_domain(domain)
        elif address:
            async with connect(address, pid) as vm:
                findings = await qemu_prefault.probe(vm)
        else:
            assert pid is not None
            findings = await qemu_prefault.probe_process(pid)
        Printer(as_json).result(findings.to_json(), findings_lines(findings))
        if findings.exit_status:
            sys.exit(int(findings.exit_status))

    with reporting(as_json, debug):
        run_async(main())
