# SPDX-License-Identifier: GPL-2.0-or-later
"""Check which features work with this host and QEMU, and report remedies.

Each check uses the code of a real run, but changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..agents.base import VcpuThread
from ..agents.gadgets import find_gadgets
from ..agents.helper_calls import check_filters
from ..agents.injector import check_untraced, choose_threads
from ..agents.plugin import Control, find_control_socket
from ..agents.qemu_process import open_memory
from ..agents.qmp import offers_command
from ..errors import ExitStatus, QemuPrefaultError
from ..host import kvm
from ..host.placement import CAP_SYS_NICE
from ..host.procfs import Process
from ..qemu.qapi import quote
from .options import Options
from .report import SCHEMA
from .run import prefault
from .vm import Vm


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    #: The name of the check, for example ``kvm``.
    check: str
    #: ``ok``, ``no`` or ``note``.
    verdict: str
    #: The result of the check as text.
    text: str
    #: The action that solves the problem, or an empty string.
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of all checks, and the exit status of the command."""

    #: QEMU's process id, or 0 if QEMU was not examined.
    pid: int
    findings: tuple[Finding, ...]
    exit_status: ExitStatus

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``qemu-prefault probe --json``."""
        return {
            "schema": SCHEMA,
            "pid": self.pid,
            "findings": [asdict(finding) for finding in self.findings],
            "exit": int(self.exit_status),
        }


async def probe_process(pid: int) -> Findings:
    """Check this host and a QEMU process without using its monitor.

    :raises GoneError: If the process does not exist.
    """
    process = Process.find(pid)
    findings, status = await _host(process)
    findings.append(await _plugin(process))
    findings.append(
        Finding(
            "qmp", "note", "the guest was not checked", "to check the guest, specify --qmp SOCK"
        )
    )
    return Findings(process.pid, tuple(findings), status)


async def probe(vm: Vm) -> Findings:
    """Check this host and a connected QEMU."""
    findings, status = await _host(vm.process)
    findings.append(await _plugin(vm.process))
    state = vm.state
    findings.append(
        Finding(
            "qemu",
            "ok",
            f"pid {vm.process.pid}, version {state.version}, {state.machine_type}, "
            f"{state.status}, {len(state.vcpus)} vCPUs",
        )
    )
    if await offers_command(vm.monitor):
        text = "x-kvm-prefault-memory is present: QEMU prefaults the guest without being traced"
        findings.append(Finding("patched", "ok", text))
    for populate_only in (False, True):
        name = "populate" if populate_only else "prefault"
        try:
            report = await prefault(vm, Options(populate_only=populate_only, dry_run=True))
        except QemuPrefaultError as error:
            findings.append(Finding(name, "no", error.cause, error.remedy))
            if not populate_only:
                status = status or error.exit_status
            continue
        findings.append(
            Finding(name, "ok", f"a run would {name} {report.bytes.requested >> 20} MiB now")
        )
        if not populate_only:
            findings += [Finding(w.code, "note", w.text) for w in report.warnings]
    return Findings(vm.process.pid, tuple(findings), status)


async def _plugin(process: Process) -> Finding:
    """Check whether QEMU has loaded the plugin, and read the plugin's state."""
    socket = find_control_socket(process)
    if socket is None:
        return Finding(
            "plugin",
            "note",
            "QEMU has not loaded the plugin, which would prefault the guest again after its "
            "firmware, a reset or a migration",
            "start QEMU with `qemu-prefault run -- …`, or with "
            '-plugin "$(qemu-prefault plugin-path)"',
        )
    try:
        async with Control.open(socket, process) as control:
            status = await control.status()
    except QemuPrefaultError as error:
        return Finding("plugin", "no", error.cause, error.remedy)
    state = (
        "keeps the guest prefaulted"
        if status["keeping"]
        else "loaded, but paused or started with keep=off"
    )
    if status["held"]:
        state = f"waiting: {status['held']}"
    return Finding(
        "plugin",
        "ok" if status["pre_fault_memory"] else "no",
        f"{state}; {status['pending'] >> 20} MiB pending, slot-zap-all quirk {status['quirk']}, "
        f"{_prefault_vcpus(status)}, control socket {socket}",
        "" if status["pre_fault_memory"] else "see the remedy of the kvm check",
    )


def _prefault_vcpus(status: dict[str, Any]) -> str:
    """Say on which vCPUs the plugin prefaults."""
    ids = [str(vcpu["id"]) for vcpu in status["prefault_vcpus"]]
    if ids:
        return f"prefault vCPUs with the ids {' and '.join(ids)}"
    if (why := status["no_prefault_vcpus"]) is None:
        return "the guest's vCPUs prefault"
    return f"the guest's vCPUs prefault ({quote(why)[1:-1]})"


def paging_finding() -> Finding | None:
    """Report how KVM translates guest addresses, and the features of EPT that matter to a run."""
    paging = kvm.paging()
    if paging is None or paging.name == "shadow":
        # Nothing is known, or the finding about KVM reports shadow paging.
        return None
    if paging.name == "NPT":
        return Finding("paging", "ok", "NPT, which always has accessed/dirty bits")
    if not paging.ad_bits:
        text = (
            "EPT without accessed/dirty bits (kvm_intel.eptad=N): the first access to each "
            "prefaulted page still exits, and dirty logging write-protects pages"
        )
        remedy = (
            "load kvm_intel with eptad=1 if the CPU supports these bits, or use --populate-only"
        )
        return Finding("paging", "note", text, remedy)
    logging = (
        "dirty logging uses PML and does not write-protect 4K pages"
        if paging.pml
        else "dirty logging write-protects pages, because PML is off (kvm_intel.pml=N)"
    )
    return Finding("paging", "ok", f"EPT with accessed/dirty bits; {logging}")


async def _host(process: Process) -> tuple[list[Finding], ExitStatus]:
    """Check the kernel, KVM, and whether helpers can be started in QEMU."""
    status = ExitStatus.VERIFIED
    findings = [Finding("kernel", "ok", os.uname().release)]
    capability = kvm.pre_fault_capability(process)
    if capability.available:
        findings.append(Finding("kvm", "ok", "KVM_PRE_FAULT_MEMORY is available"))
    else:
        verdict = "note" if capability.available is None else "no"
        findings.append(Finding("kvm", verdict, capability.reason, capability.remedy))
        if capability.available is False:
            status = ExitStatus.UNSUPPORTED
    if (paging := paging_finding()) is not None:
        findings.append(paging)
    try:
        memory = open_memory(process)
        try:
            find_gadgets(process, memory, process.maps())
        finally:
            os.close(memory)
        check_filters(process, [process.pid])
        await check_untraced(process, [])
        choose_threads(process, [VcpuThread(process.pid, -1, None)])
    except QemuPrefaultError as error:
        findings.append(Finding("attach", "no", error.cause, error.remedy))
        status = status or error.exit_status
    else:
        findings.append(Finding("attach", "ok", "this process can trace QEMU"))
        if not Process.find(os.getpid()).status().has_capability(CAP_SYS_NICE):
            text = (
                "this process lacks CAP_SYS_NICE, so helpers may keep the vCPUs' scheduling policy "
                "and CPU affinity"
            )
            remedy = "run as root or use the plugin agent if vCPUs are real-time or pinned"
            findings.append(Finding("scheduling", "note", text, remedy))
    return findings, status
