# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault`` command without a subcommand, which prefaults a guest."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

import qemu_prefault

from ..errors import ExitStatus
from ..units import PAGE_SIZE
from .console import Printer, reporting, run_async
from .format import event_line, report_lines
from .options import (
    connect,
    debug_option,
    domain_option,
    index_list_type,
    json_option,
    pid_option,
    qmp_option,
    range_type,
    required_address,
    size_type,
)

if TYPE_CHECKING:
    from ..api import Options

_F = TypeVar("_F", bound=Callable[..., None])

_OPTIONS = (
    qmp_option,
    domain_option,
    pid_option,
    click.option(
        "--agent",
        type=click.Choice(["auto", "attach", "plugin", "qmp"]),
        default="auto",
        show_default=True,
        help="Method that calls the ioctl inside QEMU. attach starts helper threads in QEMU with "
        "ptrace. plugin uses qemu-prefault-plugin.so, if QEMU was started with the plugin. qmp "
        "uses a QMP command of patched QEMUs. auto selects plugin if the plugin is loaded, "
        "otherwise qmp if QEMU has the command, otherwise attach.",
    ),
    click.option(
        "--populate",
        type=click.Choice(["auto", "all", "resident"]),
        default="auto",
        show_default=True,
        help="Memory to populate. auto populates all RAM, except memory that must stay absent "
        "because of virtio-mem, a balloon or reserve=off. all populates all RAM. "
        "resident populates no memory, so that only resident memory is prefaulted.",
    ),
    click.option(
        "--populate-only",
        is_flag=True,
        help="Populate QEMU's own page tables, but not the stage-2 tables. This option works on "
        "any kernel, and without KVM.",
    ),
    click.option(
        "--range",
        "ranges",
        type=range_type,
        metavar="GPA+SIZE",
        multiple=True,
        help="Prefault only this guest-physical range, e.g. 4G+512M. This option can be repeated.",
    ),
    click.option(
        "--max-bytes",
        type=size_type,
        metavar="SIZE",
        help="Prefault at most SIZE bytes, starting at the lowest address.",
    ),
    click.option(
        "--vcpus", type=index_list_type, metavar="LIST", help="Use only these vCPUs, e.g. 0,2-3."
    ),
    click.option(
        "--chunk",
        type=size_type,
        metavar="SIZE",
        help="Maximum number of bytes to prefault with one system call. A memory slot change waits "
        "until the call returns. Default: 32M.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Populate even if the host seems to have too little memory, or if QEMU's cgroups "
        "cannot be read.",
    ),
    click.option(
        "--cont", is_flag=True, help="Resume the guest after the run, even if it was paused before."
    ),
    click.option(
        "--incoming",
        is_flag=True,
        help="Wait for the incoming guest of a QEMU that was started with -incoming. Populate the "
        "RAM while QEMU loads the guest, then prefault the guest, then start it. If QEMU was "
        "started with -S, the guest starts only with --cont.",
    ),
    click.option(
        "--max-downtime",
        type=click.FloatRange(0.001),
        metavar="SECONDS",
        help="Maximum length of one pause of the guest, in seconds. If one pause is not enough, "
        "qemu-prefault pauses the guest several times.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Show what a run would do, without changing anything."
    ),
    click.option(
        "--follow",
        is_flag=True,
        help="Keep the guest prefaulted until QEMU exits or Ctrl-C is pressed. For each prefault, "
        "print the time and the reason. If QEMU has no plugin, prefault the guest now, and again "
        "whenever KVM drops stage-2 tables or memory is added to the guest.",
    ),
    json_option,
    debug_option,
)


def prefault_options(function: _F) -> _F:
    """Add all options of the command, in the order in which ``--help`` shows them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def prefault(
    context: click.Context,
    *,
    qmp: str | None,
    domain: str | None,
    pid: int | None,
    agent: str,
    populate: str,
    populate_only: bool,
    ranges: tuple[tuple[int, int], ...],
    max_bytes: int | None,
    vcpus: tuple[int, ...] | None,
    chunk: int | None,
    force: bool,
    cont: bool,
    incoming: bool,
    max_downtime: float | None,
    dry_run: bool,
    follow: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Check the options, and prefault the guest once or until QEMU exits."""
    if not (qmp or domain or pid) and not any(
        (populate_only, ranges, cont, incoming, dry_run, follow, as_json)
    ):
        Printer(False).result({}, iter(context.get_help().splitlines()))
        context.exit(int(ExitStatus.USAGE))
    address = required_address(qmp, domain)
    if incoming and domain:
        raise click.UsageError(
            "--incoming cannot be used with --domain, because libvirt accepts no QMP commands "
            "during a migration. Use qemu-prefault libvirt migrate instead"
        )
    if chunk is not None and (chunk < PAGE_SIZE or chunk % PAGE_SIZE):
        raise click.UsageError("--chunk must be a multiple of 4096 bytes")
    if max_bytes is not None and max_bytes < PAGE_SIZE:
        raise click.UsageError("--max-bytes must be at least one page, 4096 bytes")
    if follow and (dry_run or cont or populate_only or incoming):
        raise click.UsageError(
            "--follow cannot be used with --dry-run, --cont, --incoming or --populate-only"
        )
    options = qemu_prefault.Options(
        populate=qemu_prefault.Populate(populate),
        ranges=ranges,
        max_bytes=max_bytes,
        vcpus=vcpus or (),
        populate_only=populate_only,
        force=force,
        chunk_bytes=chunk,
        max_downtime=max_downtime,
        cont=cont,
        incoming=incoming,
        dry_run=dry_run,
        agent=qemu_prefault.AgentChoice(agent),
    )
    if follow:
        with reporting(as_json, debug), contextlib.suppress(KeyboardInterrupt):
            run_async(_follow(address, pid, options, as_json))
        return
    with reporting(as_json, debug):
        run_async(_prefault(address, pid, options, as_json))


async def _prefault(address: str, pid: int | None, options: Options, as_json: bool) -> None:
    printer = Printer(as_json)
    async with connect(address, pid, loading=options.incoming) as vm:
        try:
            report = await qemu_prefault.prefault_async(
                vm, options, on_ready=printer.ready, on_progress=printer.progress
            )
        finally:
            printer.end_progress()
    printer.result(report.to_json(), report_lines(report))
    if report.exit_status:
        sys.exit(int(report.exit_status))


async def _follow(address: str, pid: int | None, options: Options, as_json: bool) -> None:
    printer = Printer(as_json)
    async with connect(address, pid) as vm:
        async for event in qemu_prefault.follow(vm, options):
            printer.result(event, iter([event_line(event)]))
