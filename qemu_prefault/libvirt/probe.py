# SPDX-License-Identifier: GPL-2.0-or-later
"""Check whether a libvirt domain can be prefaulted, for ``probe --domain``.

The checks read files and query libvirt, but change nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..engine.probe import Finding, Findings, probe
from ..errors import ExitStatus, LibvirtError, QemuPrefaultError
from ..host.procfs import Process
from . import domain_xml, install
from .connection import connect, default_uri, errors, lookup, module
from .domain_xml import Domain, Loaded
from .find_qemu import find_qemu
from .hook_config import LifecycleEvent, When, read
from .prelaunch import boot_ram
from .qmp_proxy import connect_vm

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


async def probe_domain(name: str) -> Findings:
    """Check this host for one domain, and the domain's QEMU if it is running.

    :raises QemuPrefaultError: If libvirt does not respond, or if the domain does not exist.
    """
    libvirt = module()
    connection = connect()
    domain = lookup(connection, name)
    with errors():
        active = bool(domain.isActive())
        xml = domain.XMLDesc(0 if active else libvirt.VIR_DOMAIN_XML_INACTIVE).encode()
        versions = connection.getLibVersion(), connection.getVersion()
        host_xml = connection.getCapabilities().encode()
    about = domain_xml.describe(xml)
    process = None
    findings = [_daemon(versions)]
    if active:
        try:
            process = find_qemu(about.name, about.uuid)
        except QemuPrefaultError as error:
            findings.append(Finding("qemu", "no", error.cause, error.remedy))
    found = domain_xml.loaded(xml)
    findings += [*_lsm(host_xml, process, found is not None), *_seccomp(process), _pages(about)]
    findings += [_plugin_route(about, found), *_hook_route(about)]
    findings.append(_commands_route(about, active))
    if process is None:
        why = "the domain is not running" if not active else "QEMU was not found on this host"
        findings.append(Finding("guest", "note", f"not checked: {why}"))
        return Findings(0, tuple(findings), _status(findings))
    async with connect_vm(about.uuid, process.pid) as vm:
        inner = await probe(vm)
    # Drop the advice on how to load the plugin. It applies only to QEMU outside libvirt.
    rest = [f for f in inner.findings if not (f.check == "plugin" and f.verdict == "note")]
    return Findings(process.pid, (*findings, *rest), inner.exit_status)


def _status(findings: list[Finding]) -> ExitStatus:
    bad = any(finding.verdict == "no" for finding in findings)
    return ExitStatus.UNSUPPORTED if bad else ExitStatus.VERIFIED


def _daemon(versions: tuple[int, int]) -> Finding:
    def dotted(number: int) -> str:
        return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"

    daemon = "libvirtd" if Path("/run/libvirt/libvirt-sock").exists() else "virtqemud"
    return Finding(
        "daemon",
        "ok",
        f"{daemon} {dotted(versions[0])} at {default_uri()}, QEMU {dotted(versions[1])}",
    )


# --- confinement and host settings ---


def _lsm(host_xml: bytes, process: Process | None, plugin: bool) -> Iterator[Finding]:
    models = _security_models(host_xml)
    label = ""
    if process is not None:
        try:
            path = Path(f"/proc/{process.pid}/attr/current")
            label = path.read_text(errors="replace").strip("\0\n ")
        except OSError:
            label = ""
    if "apparmor" in models:
        yield from _apparmor(label, plugin)
    elif "selinux" in models:
        yield Finding(
            "selinux",
            "note",
            f"SELinux confines guests{f' ({label})' if label else ''}, and does not allow a hook "
            "(virtqemud_t) to trace them",
            'use the plugin, or set "later" or "follow" for the hook, so that systemd starts the '
            "prefault. To label the plugin, run: "
            f"restorecon -Rv {install.installed_plugin().parent}",
        )
    else:
        yield Finding("lsm", "ok", "libvirt does not use AppArmor or SELinux to confine guests")


def _security_models(host_xml: bytes) -> set[str]:
    # libvirtd, which runs as root, generates this XML.
    from xml.etree import ElementTree  # noqa: PLC0415 # nosec B405

    try:
        root = ElementTree.fromstring(host_xml)  # nosec B314
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise LibvirtError(
            f"libvirt describes this host in XML that cannot be parsed: {error}",
            "see: virsh capabilities",
        ) from None
    return {e.text or "" for e in root.findall("host/secmodel/model")}


def _apparmor(label: str, plugin: bool) -> Iterator[Finding]:
    rule = Path("/") / install.APPARMOR_RULE
    confined = f" ({label})" if label else ""
    try:
        has_rule = rule.read_text() == install.RULE_TEXT
    except OSError:
        has_rule = False
    if has_rule:
        yield Finding("apparmor", "ok", f"AppArmor confines guests{confined}, and {rule} exists")
    else:
        yield Finding(
            "apparmor",
            "no" if plugin else "note",
            f"AppArmor confines guests{confined}, and denies the plugin access to /proc and /sys",
            f"run qemu-prefault libvirt install, or add to {rule}:\n{install.RULE_TEXT.rstrip()}",
        )


def _seccomp(process: Process | None) -> Iterator[Finding]:
    if process is not None:
        filtered = process.status().seccomp == 2
        text = "QEMU's seccomp sandbox is on, and allows the plugin and the helper threads"
        yield Finding(
            "seccomp", "ok", text if filtered else "QEMU runs without its seccomp sandbox"
        )


def _pages(domain: Domain) -> Finding:
    if domain.huge:
        return Finding(
            "pages",
            "note",
            "the domain uses hugetlb pages, so prefaulting saves only a few hundred faults",
        )
    try:
        mode = THP.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        mode = "never"
    if mode == "never":
        return Finding(
            "pages",
            "ok",
            "only 4K pages back the RAM (THP is off), so prefaulting saves most faults",
        )
    return Finding(
        "pages",
        "note",
        f"THP is {mode}, so prefaulting saves few faults in memory that the host backs with huge "
        "pages",
    )


# --- methods of prefaulting ---


def _plugin_route(domain: Domain, found: Loaded | None) -> Finding:
    path = Path(found.path) if found else install.installed_plugin()
    if found is None:
        remedy = f"qemu-prefault libvirt enable {domain.name}"
        if not path.exists():
            remedy = f"qemu-prefault libvirt install && {remedy}"
        return Finding(
            "enable",
            "note",
            "the domain does not load the plugin, which would prefault the guest after boots, "
            "resets, restores, migrations and hotplug",
            remedy,
        )
    if not path.exists():
        return Finding(
            "enable",
            "no",
            f"the domain loads {path}, which does not exist on this host, so QEMU cannot start",
            "qemu-prefault libvirt install",
        )
    if not install.is_current(path):
        return Finding(
            "enable",
            "note",
            f"{path} is from another version of qemu-prefault",
            "qemu-prefault libvirt install",
        )
    return Finding("enable", "ok", f"the domain loads {path}")


def _hook_route(domain: Domain) -> Iterator[Finding]:
    hook = Path("/") / install.HOOK
    if not hook.exists():
        yield Finding("hook", "note", "not installed", "qemu-prefault libvirt install --hook")
        return
    try:
        policy = read(domain)
    except QemuPrefaultError as error:
        yield Finding("hook", "no", error.cause, error.remedy)
        return
    wanted = {moment.value: policy.at(moment).value for moment in LifecycleEvent}
    text = ", ".join(f"{moment}={when}" for moment, when in wanted.items())
    remedy = ""
    if all(when == "off" for when in wanted.values()):
        text += ": the hook does nothing for this domain"
        remedy = (
            f"virsh metadata {domain.name} {domain_xml.OWN_NAMESPACE} --key prefault "
            "--set '<hook restore=\"now\"/>' --config --live"
        )
    yield Finding("hook", "note" if remedy else "ok", text, remedy)
    if policy.restore is When.NOW:
        try:
            boot_ram(domain.machine, domain.memory)
        except QemuPrefaultError as error:
            yield Finding("hook", "note", f"restore=now: {error.cause}", error.remedy)
    if not shutil.which("systemd-run"):
        yield Finding(
            "hook",
            "note",
            "systemd-run is not installed, so the hook prefaults the guest in a background process "
            "and not in a systemd unit",
        )


def _commands_route(domain: Domain, active: bool) -> Finding:
    if active:
        return Finding(
            "domain", "ok", f"to prefault the domain now: qemu-prefault --domain {domain.name}"
        )
    return Finding(
        "domain",
        "ok",
        f"to start a managed save image, run qemu-prefault libvirt start {domain.name}. "
        "To restore a file, run qemu-prefault libvirt restore FILE",
    )
