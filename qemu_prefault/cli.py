# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: a thin user of the public API.

What heavier commands need is imported when they run, so that ``--help`` and completion are
quick.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from typing import TYPE_CHECKING

import click

from . import __version__
from .errors import ExitStatus, InputError, UnsupportedError
from .libvirt.commands import libvirt
from .output import Printer, drop_stdout, fail, printable, reporting, run_async, say

if TYPE_CHECKING:
    from .plan import Policy

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}

EPILOG = """\b
Examples:
  qemu-prefault --qmp /run/vm.qmp                prefault all RAM of a running guest
  qemu-prefault --qmp /run/vm.qmp --cont         ... of a restored one, and start it
  qemu-prefault --qmp /run/vm.qmp --dry-run      what would be done
  qemu-prefault probe --qmp /run/vm.qmp          what works here, what does not, and why
  qemu-prefault run -- qemu-system-x86_64 …      start QEMU with the plugin, always prefaulted

\b
Exit status:
  0 every requested byte verified    3 partial
  1 failed                           4 this host or kernel cannot
  2 usage                            5 refused, to protect the guest

\b
Shell completion (zsh_source and fish_source likewise):
  eval "$(_QEMU_PREFAULT_COMPLETE=bash_source qemu-prefault)"
"""


# -- reading the command line --------------------------------------------------------------


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(0x[0-9a-f]{1,16}|[0-9]{1,20})([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        return None
    return int(match[1], 16 if match[1].startswith("0x") else 10) << UNITS[match[2]]


def size_type(text: str) -> int:
    """``0x100000``, ``4096``, ``512M``, ``2GiB`` -> bytes."""
    number = _bytes(text)
    if number is None:
        raise click.BadParameter(f"{text!r} is no size; write e.g. 65536, 0x10000, 512M or 2G")
    return number


def range_type(text: str) -> tuple[int, int]:
    """``GPA+SIZE`` -> (start, size) in bytes."""
    start, _, length = text.partition("+")
    first, count = _bytes(start), _bytes(length)
    if first is None or not count or first + count > 1 << 52:
        raise click.BadParameter(f"{text!r} is no GPA+SIZE; write e.g. 0x100000000+512M or 4G+1G")
    return first, count


def index_list_type(text: str) -> tuple[int, ...]:
    """``0,2-3`` -> (0, 2, 3)."""
    found: dict[int, None] = {}
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{text!r} is no list of vCPUs; write e.g. 0,2-3")
        found.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return tuple(found)


# -- the commands --------------------------------------------------------------------------

qmp_option = click.option(
    "--qmp", metavar="SOCK", help="QEMU's QMP socket: a path, or HOST:PORT. One client at a time."
)
domain_option = click.option(
    "--domain",
    metavar="NAME",
    help="A domain of libvirt's instead of --qmp: its QEMU is spoken to through libvirt.",
)
pid_option = click.option("--pid", type=click.IntRange(1), help="QEMU's process id.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")


def monitor_address(qmp: str | None, domain: str | None) -> str | None:
    """Where the monitor is: a socket's address, or ``libvirt:DOMAIN``."""
    if qmp and domain:
        raise click.UsageError("give either --qmp SOCK or --domain NAME")
    return f"libvirt:{domain}" if domain else qmp


def required_address(qmp: str | None, domain: str | None) -> str:
    address = monitor_address(qmp, domain)
    if not address:
        raise click.UsageError("give QEMU's QMP socket with --qmp SOCK, or --domain NAME")
    return address


@click.group(
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
@click.version_option(__version__, prog_name="qemu-prefault")
@qmp_option
@domain_option
@pid_option
@click.option(
    "--agent",
    type=click.Choice(["auto", "attach", "plugin", "qmp"]),
    default="auto",
    show_default=True,
    help="Who acts inside QEMU. attach: helper threads, started by ptrace; plugin: "
    "qemu-prefault-plugin.so, if QEMU was started with it; qmp: QEMU itself, if it is patched; "
    "auto: the plugin if it is there, else QEMU if it can, else attach.",
)
@click.option(
    "--populate",
    type=click.Choice(["auto", "all", "resident"]),
    default="auto",
    show_default=True,
    help="What may be touched: auto: all RAM but what is absent on purpose (virtio-mem, balloon, "
    "reserve=off); all: everything; resident: nothing new.",
)
@click.option(
    "--populate-only",
    is_flag=True,
    help="Fill QEMU's own page tables, not stage-2. Works on any kernel, also without KVM.",
)
@click.option(
    "--range",
    "ranges",
    type=range_type,
    metavar="GPA+SIZE",
    multiple=True,
    help="Only this guest-physical range, e.g. 4G+512M. May be repeated.",
)
@click.option(
    "--max-bytes",
    type=size_type,
    metavar="SIZE",
    help="Stop after so much, lowest addresses first.",
)
@click.option("--vcpus", type=index_list_type, metavar="LIST", help="Only these vCPUs, e.g. 0,2-3.")
@click.option(
    "--chunk",
    type=size_type,
    metavar="SIZE",
    help="Most that one system call is asked for; default 32M. Slot changes wait that long.",
)
@click.option("--force", is_flag=True, help="Populate even if memory looks too short for it.")
@click.option("--cont", is_flag=True, help="Resume the guest afterwards, also if it was paused.")
@click.option(
    "--incoming",
    is_flag=True,
    help="Wait for the guest of a QEMU started with -incoming; populate while its RAM is loaded, "
    "prefault when it is, and let it start as it would have (with -S: only with --cont).",
)
@click.option(
    "--max-downtime",
    type=click.FloatRange(0.001),
    metavar="SECONDS",
    help="Keep the guest from running for no longer than this at one go; what is left is done "
    "in further pauses.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; touch nothing.")
@click.option(
    "--follow",
    is_flag=True,
    help="Stay until QEMU ends or Ctrl-C; tell what is prefaulted again, and why. Without the "
    "plugin, do it: run now, and whenever tables were dropped or memory was added.",
)
@json_option
@debug_option
@click.pass_context
def cli(  # noqa: PLR0917
    ctx: click.Context,
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
    """Fill the stage-2 page tables of a running QEMU/KVM guest before the guest needs them.

    Finds QEMU's vCPUs and RAM over QMP, populates the RAM, has KVM map it
    (KVM_PRE_FAULT_MEMORY, Linux 6.11), and checks KVM's counters that it did. A running guest
    is paused for the second step and resumed; a paused one stays paused.
    """
    if ctx.invoked_subcommand is not None:
        if qmp or domain or pid:
            raise click.UsageError(
                f"write options behind the command: qemu-prefault {ctx.invoked_subcommand} --qmp …"
            )
        return
    if not (qmp or domain or pid) and not any(
        (populate_only, ranges, cont, incoming, dry_run, follow, as_json)
    ):
        click.echo(ctx.get_help())
        ctx.exit(int(ExitStatus.USAGE))
    address = required_address(qmp, domain)
    if incoming and domain:
        raise click.UsageError(
            "--incoming does not go with --domain: libvirt passes no commands on during a "
            "migration; see: qemu-prefault libvirt migrate --help"
        )
    if chunk is not None and (chunk < 4096 or chunk % 4096):
        raise click.UsageError("--chunk is a multiple of 4096 bytes")
    if max_bytes is not None and max_bytes < 4096:
        raise click.UsageError("--max-bytes is at least one page, 4096 bytes")
    if follow and (dry_run or cont or populate_only or incoming):
        raise click.UsageError(
            "--follow goes with neither --dry-run, --cont, --incoming nor --populate-only"
        )
    from .plan import Policy, Populate  # noqa: PLC0415

    policy = Policy(
        Populate(populate),
        ranges,
        max_bytes,
        vcpus or (),
        populate_only,
        force,
        chunk,
        max_downtime,
    )
    if follow:
        with reporting(as_json, debug), contextlib.suppress(KeyboardInterrupt):
            run_async(_follow(address, pid, policy, agent, as_json))
        return
    with reporting(as_json, debug):
        run_async(_prefault(address, pid, policy, agent, cont, incoming, dry_run, as_json))


async def _prefault(  # noqa: PLR0917
    qmp: str,
    pid: int | None,
    policy: Policy,
    agent: str,
    cont: bool,
    incoming: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from .engine import Engine  # noqa: PLC0415
    from .report import lines  # noqa: PLC0415
    from .session import Session  # noqa: PLC0415

    printer = Printer(as_json)
    async with Session.open(qmp, pid) as session:
        engine = Engine(
            session,
            policy,
            cont=cont,
            incoming=incoming,
            agent=agent,
            on_ready=printer.ready,
            on_progress=printer.progress,
        )
        try:
            report = await engine.run(dry_run)
        finally:
            printer.end_progress()
    printer.result(report.to_json(), lines(report))
    if report.exit_status:
        sys.exit(int(report.exit_status))


async def _follow(qmp: str, pid: int | None, policy: Policy, agent: str, as_json: bool) -> None:
    from .agents.plugin import find_control_socket  # noqa: PLC0415
    from .follow import follow_from_outside, follow_plugin  # noqa: PLC0415
    from .report import event_line  # noqa: PLC0415
    from .session import Session  # noqa: PLC0415

    printer = Printer(as_json)
    async with Session.open(qmp, pid) as session:
        socket = None if agent == "attach" else find_control_socket(session.process)
        events = (
            follow_plugin(session.process, socket)
            if socket
            else follow_from_outside(session, policy, agent)
        )
        async for event in events:
            printer.result(event, iter([event_line(event)]))


@cli.command("plugin-path")
@debug_option
def plugin_path(debug: bool) -> None:
    """Print where qemu-prefault-plugin.so is, for QEMU's -plugin."""
    with reporting(False, debug):
        from .agents.plugin import plugin_path as find  # noqa: PLC0415

        click.echo(find())


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-o",
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the plugin: populate=auto|all|resident, quirk=disable|keep, "
    "hold=SECONDS, socket=/PATH|~/PATH|off, keep=on|off, log=on|off. May be repeated.",
)
@debug_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(options: tuple[str, ...], command: tuple[str, ...], debug: bool) -> None:
    """Start QEMU with the plugin: prefaulted before the first instruction, and kept so.

    COMMAND is QEMU's command line, which stays as it is: the plugin is loaded by LD_PRELOAD,
    and QEMU takes this process's place, so signals and exit status are its own.
    """
    with reporting(False, debug):
        from .launch import replace_by  # noqa: PLC0415

        replace_by(command, options)


@cli.command()
@qmp_option
@domain_option
@pid_option
@json_option
@debug_option
def probe(qmp: str | None, domain: str | None, pid: int | None, as_json: bool, debug: bool) -> None:
    """Tell what would work here, what would not, why, and the command that fixes it.

    With --domain also what libvirt and its confinement let each way do, whether it runs or not.
    """
    address = monitor_address(qmp, domain)
    if not address and not pid:
        raise click.UsageError("give --qmp SOCK, --domain NAME or --pid PID")

    async def main() -> None:
        if domain:
            from .libvirt.host import probe_domain  # noqa: PLC0415

            findings = await probe_domain(domain)
        else:
            from .probe import probe as examine  # noqa: PLC0415

            findings = await examine(address, pid)
        Printer(as_json).result(findings.to_json(), findings.lines())
        if findings.exit_status:
            sys.exit(int(findings.exit_status))

    with reporting(as_json, debug):
        run_async(main())


@cli.command("map")
@qmp_option
@domain_option
@pid_option
@json_option
@debug_option
def map_(qmp: str | None, domain: str | None, pid: int | None, as_json: bool, debug: bool) -> None:
    """Show the guest's RAM: where it is, what backs it, how much is there."""
    address = required_address(qmp, domain)

    async def main() -> None:
        from .survey import ram_map  # noqa: PLC0415

        found = await ram_map(address, pid)
        Printer(as_json).result(found.to_json(), found.lines())

    with reporting(as_json, debug):
        run_async(main())


@cli.command()
@qmp_option
@domain_option
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, a line per interval.")
@click.option(
    "--interval", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Seconds."
)
@json_option
@debug_option
def stats(  # noqa: PLR0917
    qmp: str | None,
    domain: str | None,
    watch: bool,
    interval: float,
    as_json: bool,
    debug: bool,
) -> None:
    """Show KVM's counters: stage-2 leaves by size, and the guest's faults."""
    address = required_address(qmp, domain)

    async def main() -> None:
        import asyncio  # noqa: PLC0415

        from .monitor import Monitor  # noqa: PLC0415
        from .survey import counters, counters_header  # noqa: PLC0415

        async with Monitor.connect(address) as monitor:
            if not as_json:
                click.echo(counters_header())
            while True:
                now = await counters(monitor)
                Printer(as_json).result(now.to_json(), now.lines())
                if not watch:
                    return
                await asyncio.sleep(interval)

    with reporting(as_json, debug), contextlib.suppress(KeyboardInterrupt):
        run_async(main())


@cli.command()
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
        from .conformance import report, suite  # noqa: PLC0415

        printer = Printer(as_json)
        cases = [case for case in suite.all_cases() if (pattern or "") in case.id]
        if not cases:
            raise InputError(f"no case has {pattern!r} in its id", "see: conformance --list")
        if listing:
            found = [{"id": case.id, "says": case.says, "source": case.source} for case in cases]
            printer.result({"schema": 1, "cases": found}, report.listing(cases))
            return
        from .conformance import host, runner  # noqa: PLC0415

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


@cli.command()
@json_option
@debug_option
def demo(as_json: bool, debug: bool) -> None:
    """Show the whole story on any x86-64 Linux: a restored guest, and a booting one."""
    with reporting(as_json, debug):
        try:
            from qemu_prefault_lab.demo import run_demo  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if error.name != "qemu_prefault_lab":
                raise
            raise UnsupportedError(
                "the demo needs qemu-prefault-lab, which is not installed",
                "in a checkout of qemu-prefault, install it: pip install ./lab\n"
                "or install nothing and run the demo from there: make demo",
                code="no-lab",
            ) from None

        run_demo(as_json)


cli.add_command(libvirt)


def main() -> None:
    """Entry point; click's own, but for --json and for a stdout that cannot be written."""
    as_json = "--json" in sys.argv[1:]
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = cli.main(prog_name="qemu-prefault", standalone_mode=False)
    except click.ClickException as error:
        if not as_json:
            error.show()
            sys.exit(error.exit_code)
        fail(InputError(error.format_message(), "see: qemu-prefault --help"), as_json)
    except click.Abort:
        sys.exit(int(ExitStatus.FAILED))
    except OSError as error:
        drop_stdout()
        say(f"qemu-prefault: the result could not be written: {error.strerror}")
        sys.exit(int(ExitStatus.FAILED))
    sys.exit(int(status or 0))
