# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault conformance`` command, which tests the kernel's ioctl."""

from __future__ import annotations

import sys
import time

import click

from ..errors import InputError
from .console import Printer, reporting
from .options import debug_option, json_option


@click.command()
@click.option("-k", "pattern", metavar="CASE", help="Run only the cases whose id contains CASE.")
@click.option("--list", "listing", is_flag=True, help="List the cases without running them.")
@click.option(
    "--harsh",
    "destructive",
    is_flag=True,
    help="Also run cases that make the kernel log a warning or leak a page of host memory.",
)
@json_option
@debug_option
def conformance(
    pattern: str | None, listing: bool, destructive: bool, as_json: bool, debug: bool
) -> None:
    """Test how this host's kernel handles KVM_PRE_FAULT_MEMORY.

    Each case runs in its own process, and creates a VM with a few pages of memory. Before Linux
    6.11, and with shadow paging, KVM does not offer the ioctl. The cases then check that KVM
    refuses the ioctl without side effects. The exit status is 0 if every case behaves as expected.
    """
    with reporting(as_json, debug):
        from ..conformance import results, suite  # noqa: PLC0415

        printer = Printer(as_json)
        cases = [case for case in suite.all_cases() if (pattern or "") in case.id]
        if not cases:
            raise InputError(
                f"no case id contains {pattern!r}",
                "list the cases: qemu-prefault conformance --list",
            )
        if listing:
            rows = [{"id": case.id, "says": case.says, "source": case.source} for case in cases]
            printer.result({"schema": 1, "cases": rows}, results.listing(cases))
            return
        from ..conformance import host_facts, runner  # noqa: PLC0415

        facts = host_facts.read_host_facts()
        started = time.monotonic()
        if not as_json:
            printer.result({}, results.header(facts))
        found = runner.run(
            cases,
            facts,
            destructive=destructive,
            on_result=lambda result: (
                None if as_json else printer.result({}, iter([results.line(result)]))
            ),
        )
        seconds = time.monotonic() - started
        printer.result(results.to_json(facts, found, seconds), results.summary(found, seconds))
        if status := results.exit_status(found):
            sys.exit(int(status))
