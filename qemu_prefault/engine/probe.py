# SPDX-License-Identifier: GPL-2.0-or-later
"""What would work here, what would not, why, and the command that fixes it.

Every check is made in the way the real run makes it; nothing is changed.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..agents.gadgets import find_gadgets
from ..agents.helper_calls import check_filters
from ..agents.plugin import Control, find_control_socket
from ..agents.ptrace import open_memory
from ..agents.qmp import offers_command
from ..errors import ExitStatus, QemuPrefaultError
from ..host import kvm
from ..host.placement import CAP_SYS_NICE
from ..host.procfs import Process
from .options import Options
from .report import SCHEMA
from .run import prefault
from .vm import Vm


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: ``verdict`` is ``ok``, ``no`` or ``note``; ``remedy`` what to do about it."""

    check: str
    verdict: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    pid: int
    findings: tuple[Finding, ...]
    exit_status: ExitStatus

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pid": self.pid,
            "findings": [asdict(finding) for finding in self.findings],
            "exit": int(self.exit_status),
        }


async def probe_process(pid: int) -> Findings:
    """Examine this host, and a QEMU whose monitor is not known.

    :raise QemuPrefaultError: there is no such process.
    """
    process = Process.find(pid)
    findings, status = _host(process)
    findings.append(await _plugin(process))
    findings.append(
        Finding("qmp", "note", "not asked", "give --qmp SOCK to examine the guest as well")
    )
    return Findings(process.pid, tuple(findings), status)


async def probe(vm: Vm) -> Findings:
    """Examine this host and a connected QEMU."""
    findings, status = _host(vm.process)
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
        text = "x-kvm-prefault-memory is there: QEMU is not traced, it does the work itself"
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
            Finding(name, "ok", f"{report.bytes.requested >> 20} MiB could be done now")
        )
        if not populate_only:
            findings += [Finding(w.code, "note", w.text) for w in report.warnings]
    return Findings(vm.process.pid, tuple(findings), status)


async def _plugin(process: Process) -> Finding:
    """Whether the plugin is in that QEMU, and how it does."""
    socket = find_control_socket(process)
    if socket is None:
        return Finding(
            "plugin",
            "note",
            "not loaded: what firmware, a reset or a migration drops is not prefaulted again",
            "start QEMU by `qemu-prefault run -- …`, or with "
            '-plugin "$(qemu-prefault plugin-path)"',
        )
    try:
        async with Control.open(socket, process.pid) as control:
            status = await control.ask("status")
    except QemuPrefaultError as error:
        return Finding("plugin", "no", error.cause, error.remedy)
    state = "keeps the guest prefaulted" if status["keeping"] else "is loaded and pauses"
    if status["held"]:
        state = f"holds back: {status['held']}"
    return Finding(
        "plugin",
        "ok" if status["pre_fault_memory"] else "no",
        f"{state}; {status['pending'] >> 20} MiB to do, slot-zap-all quirk {status['quirk']}, "
        f"control socket {socket}",
        "" if status["pre_fault_memory"] else "this KVM cannot: see the line on kvm",
    )


def _host(process: Process) -> tuple[list[Finding], ExitStatus]:
    """Kernel, KVM, and the right to trace QEMU."""
    status = ExitStatus.VERIFIED
    findings = [Finding("kernel", "ok", os.uname().release)]
    capability = kvm.pre_fault_capability(process)
    if capability.available:
        findings.append(Finding("kvm", "ok", "KVM_PRE_FAULT_MEMORY is there"))
    else:
        verdict = "note" if capability.available is None else "no"
        findings.append(Finding("kvm", verdict, capability.reason, capability.remedy))
        if capability.available is False:
            status = ExitStatus.UNSUPPORTED
    try:
        memory = open_memory(process)
        try:
            find_gadgets(memory, process.maps())
        finally:
            os.close(memory)
        check_filters(process, [process.pid])
    except QemuPrefaultError as error:
        findings.append(Finding("attach", "no", error.cause, error.remedy))
        status = status or error.exit_status
    else:
        findings.append(Finding("attach", "ok", "QEMU can be traced from here"))
        if not Process.find(os.getpid()).status().has_capability(CAP_SYS_NICE):
            text = "CAP_SYS_NICE is missing: helpers may keep the vCPUs' scheduling and CPUs"
            remedy = "with real-time or pinned vCPUs, run as root, or use the plugin agent"
            findings.append(Finding("scheduling", "note", text, remedy))
    return findings, status
