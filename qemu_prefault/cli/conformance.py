# SPDX-License-Identifier: GPL-2.0-or-later
"""``qemu-prefault conformance``: what this host's kernel really does."""

from __future__ import annotations

import sys
import time

import click

from ..errors import InputError
from ..units import printable
from .console import Printer, reporting
from .options import debug_option, json_option


@click.command()
@click.option("-k", "pattern", metavar="CASE", help="Only cases whose id contains this.")
@click.option("--list", "listing", is_flag=True, help="Show the cases; run nothing.")
@click.option(
    "--harsh",
    is_flag=True,
    help="Also cases that make the kernel warn, or cost the host a page of memory.",
)
@json_option
@debug_option
def conformance(
    pattern: str | None, listing: bool, harsh: bool, as_json: bool, debug: bool
) -> None:
    """Test what this host's kernel really does with KVM_PRE_FAULT_MEMORY, in VMs of a few pages.

    Each case runs in a process of its own. Where the ioctl is not on offer (old kernels, shadow
    paging) the cases check the refusal, and that it does no harm. Exit status 0: all as expected.
    """
    with reporting(as_json, debug):
        from ..conformance import report, suite  # noqa: PLC0415

        printer = Printer(as_json)
        cases = [case for case in suite.all_cases() if (pattern or "") in case.id]
        if not cases:
            raise InputError(f"no case has {pattern!r} in its id", "see: conformance --list")
        if listing:
            found = [{"id": case.id, "says": case.says, "source": case.source} for case in cases]
            printer.result({"schema": 1, "cases": found}, report.listing(cases))
            return
        from ..conformance import host, runner  # noqa: PLC0415

        this = host.look()
        started = time.monotonic()
        if not as_json:
            click.echo(report.header(this))
        results = runner.run(
            cases,
            this,
            harsh=harsh,
            on_result=lambda result: (
                None if as_json else click.echo(printable(report.line(result)))
            ),
        )
        seconds = time.monotonic() - started
        printer.result(report.to_json(this, results, seconds), report.summary(results, seconds))
        if status := report.exit_status(results):
            sys.exit(int(status))
