# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``qemu-prefault libvirt`` commands."""

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

debug_option = click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
connect_option = click.option(
    "-c",
    "--connect",
    "uri",
    metavar="URI",
    help="URI of the libvirt connection. Default: $LIBVIRT_DEFAULT_URI, or qemu:///system.",
)


@click.group()
def libvirt() -> None:
    """Prefault guests that libvirt starts.

    Some of the commands set up the plugin, a hook or a daemon. Other commands start a guest and
    prefault it. To prefault a running domain, use `qemu-prefault --domain NAME`.
    """


@libvirt.command()
@connect_option
@click.option(
    "-o",
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="Plugin option, from the list in `qemu-prefault run --help`. This option can be repeated.",
)
@click.option(
    "--plugin",
    metavar="PATH",
    help="Path of the plugin. Default: the path to which `install` copies it.",
)
@debug_option
@click.argument("domain")
def enable(
    domain: str, uri: str | None, options: tuple[str, ...], plugin: str | None, debug: bool
) -> None:
    """Add the plugin to DOMAIN.

    The plugin prefaults the guest before its first instruction, and keeps it prefaulted.

    DOMAIN is a name or a UUID. If DOMAIN is -, the command reads XML from stdin and writes the
    changed XML to stdout. The command adds -plugin to the <qemu:commandline> of the definition and
    changes nothing else. The change takes effect the next time that the domain is started.
    """
    with reporting(False, debug):
        from ..libvirt.domain_xml import enable as edit  # noqa: PLC0415
        from ..libvirt.install import (  # noqa: PLC0415
            CONTROL_SOCKET,
            check_plugin,
            installed_plugin,
            is_current,
        )

        path = Path(plugin) if plugin else installed_plugin()
        if not path.is_absolute() or "," in str(path):
            raise InputError(
                f"{path} is not an absolute path, or it contains a comma",
                "specify an absolute path without a comma: --plugin /PATH",
            )
        qemu_prefault.check_plugin_options(options)
        if not any(option.startswith("socket=") for option in options):
            options = (f"socket={CONTROL_SOCKET}", *options)
        if domain == "-":
            xml = edit(sys.stdin.buffer.read(), str(path), options).xml
            sys.stdout.buffer.write(xml)
            return
        if not path.exists():
            raise InputError(
                f"the plugin is not installed at {path}, so QEMU would not start",
                "install the plugin on every host on which this domain can run: "
                "qemu-prefault libvirt install",
                code=Code.NOT_INSTALLED,
            )
        check_plugin(path, uri)
        if not plugin and not is_current(path):
            say(
                f"{path} is from another version of qemu-prefault. To update the file, run: "
                "qemu-prefault libvirt install"
            )
        _define(domain, uri, lambda xml: edit(xml, str(path), options), "enabled")


@libvirt.command()
@connect_option
@debug_option
@click.argument("domain")
def disable(domain: str, uri: str | None, debug: bool) -> None:
    """Remove the plugin from DOMAIN.

    DOMAIN is a name or a UUID. If DOMAIN is -, the command reads XML from stdin and writes the
    changed XML to stdout.
    """
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
        say(f"{domain}: the plugin is already {what}, so the definition was not changed")
        return
    known.write(domain, edited.xml)
    say(f"{domain}: {what}")
    if known.running(domain):
        say(
            "  the domain is running. The change takes effect after the domain is shut down and "
            "started. A reboot inside the guest is not enough"
        )
    if known.saved(domain):
        say(
            "  the domain has a managed save image, which contains the old definition. Edit the "
            f"image with virsh managedsave-edit {domain}, or remove it with virsh "
            f"managedsave-remove {domain}"
        )


@libvirt.command()
@connect_option
@json_option
@debug_option
@click.argument("domain")
def status(domain: str, uri: str | None, as_json: bool, debug: bool) -> None:
    """Show whether DOMAIN loads the plugin, and show the plugin's state.

    DOMAIN is a name or a UUID. If DOMAIN is -, the command reads XML from stdin. The plugin has a
    state only if the domain is running. The exit status is 0 if the domain loads the plugin, and 3
    if it does not.
    """
    with reporting(as_json, debug):
        from ..libvirt.status import read_domain_status  # noqa: PLC0415

        found = read_domain_status(domain, uri)
        Printer(as_json).result(found.to_json(), status_lines(found))
        if not found.enabled:
            sys.exit(int(ExitStatus.PARTIAL))


@libvirt.command()
@click.option("--hook", is_flag=True, help="Also install the hook in /etc/libvirt/hooks/qemu.d.")
@click.option("--watch", is_flag=True, help="Also install the systemd unit of `libvirt watch`.")
@click.option("--remove", is_flag=True, help="Remove everything that `install` installs.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("/"),
    help="Install the files below this directory instead of /, for packaging.",
)
@debug_option
def install(hook: bool, watch: bool, remove: bool, root: Path, debug: bool) -> None:
    """Install the plugin for libvirt's QEMU.

    The command copies the plugin to a directory from which QEMU is allowed to load it. If the host
    uses AppArmor, the command also installs the AppArmor rule that the plugin needs.
    """
    with reporting(False, debug):
        from ..libvirt.install import install as put  # noqa: PLC0415
        from ..libvirt.install import uninstall  # noqa: PLC0415

        printer = Printer(False)
        if remove:
            printer.result({}, (f"removed {path}" for path in uninstall(root)))
            return
        done = put(root, hook=hook, unit=watch)
        printer.result({}, (f"{'wrote' if i.changed else 'kept'} {i.path}" for i in done))
        if hook:
            say(
                "libvirt's daemon finds new hooks only when it starts, so run: "
                "systemctl restart libvirtd (or virtqemud)"
            )
        if watch:
            say(
                "to start the daemon, run: "
                "systemctl daemon-reload && systemctl enable --now qemu-prefault-watch"
            )


@libvirt.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def hook(arguments: tuple[str, ...]) -> None:
    """Handle a call from libvirt's hook.

    The /etc/libvirt/hooks/qemu.d/50-qemu-prefault hook runs this command, and passes the domain XML
    on stdin. The domain's metadata (namespace urn:qemu-prefault:1) or the
    /etc/qemu-prefault/libvirt.toml file selects the action for each event. The exit status is
    always 0. The command logs errors to syslog, and journalctl -t qemu-prefault shows them.
    """
    from ..libvirt.hook import main  # noqa: PLC0415

    sys.stdout.buffer.write(main(arguments))


def _lifecycle_options(function: Any) -> Any:
    """Add the options that ``start``, ``restore`` and ``migrate`` have in common."""
    for decorate in (
        debug_option,
        json_option,
        click.option(
            "--populate",
            type=click.Choice(["auto", "all", "resident"]),
            default="auto",
            show_default=True,
            help="Memory to populate, as for `qemu-prefault` without a command.",
        ),
        connect_option,
    ):
        function = decorate(function)
    return function


def _prefault_at(begin: Any, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    with reporting(as_json, debug):
        from ..libvirt.connection import default_uri  # noqa: PLC0415

        # The QMP proxy is another process, and reads the URI from its environment.
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
@_lifecycle_options
def start(domain: str, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    """Start DOMAIN paused, prefault its guest, and resume it.

    Use this command only if the domain has a managed save image. If it has none, use `enable`
    instead, because the guest would boot, and its firmware would make KVM drop most of the
    prefaulted entries.
    """

    def begin(policy: Any, on_progress: Any) -> Any:
        from ..libvirt.lifecycle import start as act  # noqa: PLC0415

        return act(domain, uri, policy, on_progress)

    _prefault_at(begin, uri, populate, as_json, debug)


@libvirt.command()
@click.argument("file", type=click.Path(path_type=Path))
@_lifecycle_options
def restore(file: Path, uri: str | None, populate: str, as_json: bool, debug: bool) -> None:
    """Restore a guest from FILE, prefault it, and resume it.

    FILE is a file that `virsh save` wrote.
    """

    def begin(policy: Any, on_progress: Any) -> Any:
        from ..libvirt.lifecycle import restore as act  # noqa: PLC0415

        return act(str(file.absolute()), uri, policy, on_progress)

    _prefault_at(begin, uri, populate, as_json, debug)


@libvirt.command()
@click.argument("domain")
@click.option(
    "--from", "source", metavar="URI", required=True, help="URI of libvirt on the source host."
)
@click.option(
    "--migrate-uri",
    metavar="URI",
    help="URI to which the source sends the migration data, for example tcp://THIS_HOST.",
)
@click.option("--persistent", is_flag=True, help="Also define the domain on this host.")
@click.option("--undefine-source", is_flag=True, help="Undefine the domain on the source host.")
@_lifecycle_options
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
    """Migrate DOMAIN to this host, prefault its guest, and resume it.

    The migration is live. Run this command on the destination host.
    """

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
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    help="Serve Prometheus metrics over HTTP at this address. :PORT means 127.0.0.1:PORT. Other "
    "hosts can connect only if ADDRESS is specified, for example 0.0.0.0.",
)
@click.option(
    "--textfile",
    type=click.Path(path_type=Path),
    help="Write metrics to this file every 15 seconds, for node_exporter. The daemon removes the "
    "file when it exits.",
)
@click.option(
    "--act",
    is_flag=True,
    help='Perform the "later" and "follow" actions of the hook configuration. Use this option on '
    "hosts without the hook.",
)
@debug_option
def watch(
    uri: str | None, listen: str | None, textfile: Path | None, act: bool, debug: bool
) -> None:
    """Log the lifecycle events of all domains, and export metrics.

    For each domain, the metrics are the faults, the stage-2 entries and the plugin's counters.
    """
    with reporting(False, debug), contextlib.suppress(KeyboardInterrupt):
        from ..libvirt.daemon import run  # noqa: PLC0415

        run(uri, listen=listen, textfile=textfile, act=act)
