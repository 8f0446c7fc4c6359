# SPDX-License-Identifier: GPL-2.0-or-later
"""``qemu-prefault libvirt …``: what is heavy is imported when a command runs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

import qemu_prefault

from ..errors import Code, ExitStatus, InputError
from .console import Printer, reporting, run_async, say
from .format import report_lines, status_lines

debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
connect_option = click.option(
    "-c",
    "--connect",
    "uri",
    metavar="URI",
    help="libvirt's connection; default $LIBVIRT_DEFAULT_URI, or qemu:///system.",
)


@click.group()
def libvirt() -> None:
    """Guests that libvirt starts: the plugin in a domain, a hook, a daemon, and moments.

    A domain that runs is prefaulted by `qemu-prefault --domain NAME`.
    """


@libvirt.command()
@connect_option
@click.option(
    "-o",
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the plugin, as for `run`. May be repeated.",
)
@click.option("--plugin", metavar="PATH", help="The plugin, if it is not where `install` puts it.")
@debug_option
@click.argument("domain")
def enable(
    domain: str, uri: str | None, options: tuple[str, ...], plugin: str | None, debug: bool
) -> None:
    """Have DOMAIN start with the plugin: prefaulted before its first instruction, and kept so.

    DOMAIN is a name, a UUID, or - for XML from stdin to stdout. Its definition gets a
    <qemu:commandline> with -plugin; all else stays as it is. It counts from the next start on.
    """
    with reporting(False, debug):
        from ..libvirt.domain_xml import enable as edit  # noqa: PLC0415
        from ..libvirt.install import CONTROL_SOCKET, installed_plugin, is_current  # noqa: PLC0415

        path = Path(plugin) if plugin else installed_plugin()
        if not path.is_absolute() or "," in str(path):
            raise InputError(f"{path} is no absolute path without a comma", "give --plugin /PATH")
        qemu_prefault.check_plugin_options(options)
        if not any(option.startswith("socket=") for option in options):
            options = (f"socket={CONTROL_SOCKET}", *options)
        if domain == "-":
            xml = edit(sys.stdin.buffer.read(), str(path), options).xml
            sys.stdout.buffer.write(xml)
            return
        if not path.exists():
            raise InputError(
                f"the plugin is not at {path}; QEMU would not start",
                "install it there, on every host this domain may run on: "
                "qemu-prefault libvirt install",
                code=Code.NOT_INSTALLED,
            )
        if not plugin and not is_current(path):
            say(f"{path} is of another version: qemu-prefault libvirt install brings it up to date")
        _define(domain, uri, lambda xml: edit(xml, str(path), options), "enabled")


@libvirt.command()
@connect_option
@debug_option
@click.argument("domain")
def disable(domain: str, uri: str | None, debug: bool) -> None:
    """Take the plugin out of DOMAIN; - for XML from stdin to stdout."""
    with reporting(False, debug):
        from ..libvirt.domain_xml import disable as edit  # noqa: PLC0415

        if domain == "-":
            sys.stdout.buffer.write(edit(sys.stdin.buffer.read()).xml)
            return
        _define(domain, uri, edit, "disabled")


def _define(domain: str, uri: str | None, edit: Any, what: str) -> None:
    from ..libvirt.connection import definitions  # noqa: PLC0415

    known = definitions(uri)
    edited = edit(known.read(domain))
    if not edited.changed:
        say(f"{domain}: nothing to change, it is {what} already")
        return
    known.write(domain, edited.xml)
    say(f"{domain}: {what}")
    if known.running(domain):
        say("  it runs: this counts from its next start on (a reboot within QEMU is none)")
    if known.saved(domain):
        say(
            "  it has a managed save image, which is started as it was saved: "
            f"virsh managedsave-edit {domain}, or managedsave-remove"
        )


@libvirt.command()
@connect_option
@json_option
@debug_option
@click.argument("domain")
def status(domain: str, uri: str | None, as_json: bool, debug: bool) -> None:
    """Tell whether DOMAIN loads the plugin, and how it does if it runs; - for XML from stdin.

    Exit status 0: it does; 3: it does not.
    """
    with reporting(as_json, debug):
        from ..libvirt.status import read_domain_status  # noqa: PLC0415

        found = read_domain_status(domain, uri)
        Printer(as_json).result(found.to_json(), status_lines(found))
        if not found.enabled:
            sys.exit(int(ExitStatus.PARTIAL))


@libvirt.command()
@click.option("--hook", is_flag=True, help="Also the hook, in /etc/libvirt/hooks/qemu.d.")
@click.option("--watch", is_flag=True, help="Also the unit of `libvirt watch`, for systemd.")
@click.option("--remove", is_flag=True, help="Remove all of it instead.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("/"), help="Below this directory."
)
@debug_option
def install(hook: bool, watch: bool, remove: bool, root: Path, debug: bool) -> None:
    """Put the plugin where libvirt's QEMUs may load it from, with the rule AppArmor needs."""
    with reporting(False, debug):
        from ..libvirt.install import install as put  # noqa: PLC0415
        from ..libvirt.install import uninstall  # noqa: PLC0415

        if remove:
            for path in uninstall(root):
                click.echo(f"removed {path}")
            return
        for item in put(root, hook=hook, unit=watch):
            click.echo(f"{'wrote' if item.changed else 'kept'} {item.path}")
        if hook:
            say("libvirtd reads its hooks when it starts: systemctl restart libvirtd")
        if watch:
            say("systemctl daemon-reload && systemctl enable --now qemu-prefault-watch")


@libvirt.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def hook(arguments: tuple[str, ...]) -> None:
    """What /etc/libvirt/hooks/qemu.d/50-qemu-prefault runs; `install --hook` puts it there.

    Reads the domain's XML from stdin. What is done when, the domain's metadata says (namespace
    urn:qemu-prefault:1) or /etc/qemu-prefault/libvirt.toml. Always ends with status 0; see the
    log of qemu-prefault (journalctl -t qemu-prefault).
    """
    from ..libvirt.hook import main  # noqa: PLC0415

    sys.stdout.buffer.write(main(arguments))


def _moment(function: Any) -> Any:
    """What `start`, `restore` and `migrate` have in common."""
    for decorate in (
        debug_option,
        json_option,
        click.option(
            "--populate",
            type=click.Choice(["auto", "all", "resident"]),
            default="auto",
            show_default=True,
            help="What may be touched; as without `libvirt`.",
        ),
        connect_option,
    ):
        function = decorate(function)
    return function


def _prefault_at(begin: Any, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    with reporting(as_json, debug):
        from ..libvirt.connection import default_uri  # noqa: PLC0415

        # The proxy is another process: it shall find the same libvirt.
        os.environ["LIBVIRT_DEFAULT_URI"] = default_uri(uri)
        printer = Printer(as_json)
        reports = []

        async def main() -> None:
            try:
                reports.append(
                    await begin(
                        qemu_prefault.Options(qemu_prefault.Populate(populate)), printer.progress
                    )
                )
            finally:
                printer.end_progress()

        run_async(main())
        printer.result(reports[0].to_json(), report_lines(reports[0]))
        if reports[0].exit_status:
            sys.exit(int(reports[0].exit_status))


@libvirt.command()
@click.argument("domain")
@_moment
def start(domain: str, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    """Start DOMAIN paused, prefault it, and let it run; best with a managed save image.

    What is prefaulted before firmware is mostly gone when the guest's kernel starts; for a boot
    see `enable`.
    """

    def begin(policy: Any, on_progress: Any) -> Any:
        from ..libvirt.lifecycle import start as act  # noqa: PLC0415

        return act(domain, uri, policy, on_progress)

    _prefault_at(begin, uri, populate, as_json, debug)


@libvirt.command()
@click.argument("file", type=click.Path(path_type=Path))
@_moment
def restore(file: Path, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    """Restore FILE, written by `virsh save`, prefault the guest, and let it run."""

    def begin(policy: Any, on_progress: Any) -> Any:
        from ..libvirt.lifecycle import restore as act  # noqa: PLC0415

        return act(str(file.absolute()), uri, policy, on_progress)

    _prefault_at(begin, uri, populate, as_json, debug)


@libvirt.command()
@click.argument("domain")
@click.option("--from", "source", metavar="URI", required=True, help="Where it runs now.")
@click.option("--migrate-uri", metavar="URI", help="As virsh's --migrateuri: tcp://THIS_HOST.")
@click.option("--persistent", is_flag=True, help="Define it here as well.")
@click.option("--undefine-source", is_flag=True, help="Undefine it there.")
@_moment
def migrate(  # noqa: PLR0917
    domain: str,
    source: str,
    migrate_uri: str | None,
    persistent: bool,
    undefine_source: bool,
    uri: str | None,
    populate: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Migrate DOMAIN live to this host, prefault it, and let it run. Run it at the destination."""

    def begin(policy: Any, on_progress: Any) -> Any:
        from ..libvirt.lifecycle import migrate as act  # noqa: PLC0415

        return act(
            domain,
            source,
            uri,
            policy,
            on_progress,
            migrate_uri=migrate_uri,
            persistent=persistent,
            undefine=undefine_source,
        )

    _prefault_at(begin, uri, populate, as_json, debug)


@libvirt.command()
@connect_option
@click.option("--listen", metavar="ADDRESS:PORT", help="Serve Prometheus metrics here.")
@click.option(
    "--textfile",
    type=click.Path(path_type=Path),
    help="Write them here for node_exporter, every 15 seconds; removed at the end.",
)
@click.option(
    "--act",
    is_flag=True,
    help='Do what the policies call "later" and "follow"; for hosts without the hook.',
)
@debug_option
def watch(
    uri: str | None, listen: str | None, textfile: Path | None, act: bool, debug: bool
) -> None:
    """Watch all domains: log what happens to them, and keep metrics of faults and prefaults."""
    with reporting(False, debug), contextlib.suppress(KeyboardInterrupt):
        from ..libvirt.daemon import run  # noqa: PLC0415

        run(uri, listen=listen, textfile=textfile, act=act)
