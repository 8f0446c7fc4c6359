# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the reason why the kernel denied ptrace, and a remedy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from ..errors import PtraceDeniedError
from .proc_files import PROC, gone, parse_number, read_file, read_optional
from .procfs import Process, Status, comm_of, parse_status

#: From include/uapi/linux/capability.h.
CAP_SYS_PTRACE: Final = 19


@dataclass(frozen=True, slots=True)
class PtraceFacts:
    """The facts that decide whether this process may trace another process.

    ``__ptrace_may_access()`` (kernel/ptrace.c) and the security modules evaluate these facts.
    """

    pid: int
    own_uid: int
    own_gid: int
    own_capability: bool
    own_seccomp: bool
    own_initial_user_ns: bool
    same_user_ns: bool | None
    tracer: tuple[int, str] | None
    target_uids: tuple[int, int, int, int]
    target_gids: tuple[int, int, int, int]
    target_ns_depth: int
    target_dumpable: bool
    yama_scope: int | None
    own_label: str | None
    target_label: str | None


def diagnose_ptrace(process: Process) -> tuple[str, str]:
    """Return the reason why PTRACE_SEIZE failed with EPERM, and a remedy.

    :param process: The process that could not be traced.
    :returns: The cause and the remedy for an error message.
    :raises GoneError: If the process has exited.
    """
    own = parse_status(read_file(f"{PROC}/self/status", os.getpid()))
    target = process.status()
    # The tracer may be attached to any thread.
    tracers = [process.status(tid).tracer_pid for tid in process.threads()]
    tracer = next((pid for pid in tracers if pid), 0)
    own_ns = _ns_of(f"{PROC}/self")
    target_ns = _ns_of(process.proc)
    facts = PtraceFacts(
        pid=process.pid,
        own_uid=own.uids[0],
        own_gid=own.gids[0],
        own_capability=own.has_capability(CAP_SYS_PTRACE),
        own_seccomp=own.seccomp == 2,
        own_initial_user_ns=_identity_map(read_optional(f"{PROC}/self/uid_map")),
        same_user_ns=None if target_ns is None or own_ns is None else own_ns == target_ns,
        tracer=(tracer, comm_of(tracer)) if tracer else None,
        target_uids=target.uids,
        target_gids=target.gids,
        target_ns_depth=len(target.ns_pids),
        target_dumpable=_dumpable(process, target),
        yama_scope=parse_number(read_optional(f"{PROC}/sys/kernel/yama/ptrace_scope")),
        own_label=_label(f"{PROC}/self"),
        target_label=_label(process.proc),
    )
    return explain_ptrace(facts)


def explain_ptrace(facts: PtraceFacts) -> tuple[str, str]:
    """Return the cause and the remedy for the first kernel rule that denies tracing."""
    who = f"QEMU (pid {facts.pid})"
    as_root = "run as root: sudo qemu-prefault …"
    if facts.tracer is not None:
        pid, name = facts.tracer
        return (
            f"{who} is already traced by process {pid} ({name}), and the kernel allows only one "
            "tracer",
            f"end or detach that tracer: kill {pid}",
        )
    if facts.yama_scope == 3:
        return (
            "kernel.yama.ptrace_scope is 3: the kernel refuses all tracing until the next boot",
            "use the plugin agent (qemu-prefault run), or boot with "
            "kernel.yama.ptrace_scope below 3 in /etc/sysctl.d",
        )
    if not facts.own_capability:
        return _without_capability(facts, who, as_root)
    return _with_capability(facts, who)


def _with_capability(facts: PtraceFacts, who: str) -> tuple[str, str]:
    # If QEMU's user namespace cannot be read, assume that it differs from this process's user
    # namespace unless this process runs in the initial user namespace.
    same = facts.own_initial_user_ns if facts.same_user_ns is None else facts.same_user_ns
    if not same:
        return (
            f"{who} is in another user namespace, in which this process lacks CAP_SYS_PTRACE",
            "run as root on the host, outside the container or rootless session",
        )
    if facts.own_seccomp and _confinement(facts) is None:
        return (
            "a seccomp filter of this container probably denies ptrace",
            "run on the host, or: docker run --cap-add SYS_PTRACE --security-opt "
            "seccomp=unconfined --pid host …",
        )
    return _confinement(facts) or (
        f"the kernel denies tracing of {who} for a reason that is not visible to this process",
        "see the kernel log and the audit log: dmesg | tail; ausearch -m avc -ts recent",
    )


def _without_capability(facts: PtraceFacts, who: str, as_root: str) -> tuple[str, str]:
    if facts.own_uid == 0:
        return (
            "root lacks CAP_SYS_PTRACE in this container or restricted service",
            "run on the host, or: docker run --cap-add SYS_PTRACE --pid host …; "
            "in a systemd unit: CapabilityBoundingSet=CAP_SYS_PTRACE",
        )
    same_user = set(facts.target_uids[:3]) == {facts.own_uid}
    if not same_user or set(facts.target_gids[:3]) != {facts.own_gid}:
        return (
            f"{who} runs as uid {facts.target_uids[0]}, gid {facts.target_gids[0]}, but "
            f"qemu-prefault runs as uid {facts.own_uid}, gid {facts.own_gid} without "
            "CAP_SYS_PTRACE",
            as_root,
        )
    if facts.same_user_ns is False:
        return (
            f"{who} is in another user namespace, and this process lacks CAP_SYS_PTRACE",
            as_root,
        )
    if not facts.target_dumpable:
        return (
            f"{who} is not dumpable, because it changed its user or has file capabilities",
            as_root,
        )
    if facts.yama_scope in (1, 2):
        return (
            f"kernel.yama.ptrace_scope is {facts.yama_scope}: without CAP_SYS_PTRACE a process "
            + ("can trace only its children" if facts.yama_scope == 1 else "cannot trace another"),
            f"{as_root}; or for the whole host: sysctl kernel.yama.ptrace_scope=0",
        )
    return _confinement(facts) or (
        f"the kernel denies tracing of {who} without CAP_SYS_PTRACE",
        as_root,
    )


def _confinement(facts: PtraceFacts) -> tuple[str, str] | None:
    own, target = facts.own_label or "", facts.target_label or ""
    if own.count(":") >= 3:  # user:role:type:level
        return (
            f"SELinux probably does not allow {own} to trace {target or 'QEMU'}",
            "check: ausearch -m avc -ts recent; getsebool deny_ptrace; setsebool deny_ptrace off",
        )
    # AppArmor allows an unconfined tracer to trace any process (profile_tracee_perm(),
    # security/apparmor/ipc.c). Only this process's own profile can deny tracing.
    if own not in ("", "unconfined", "kernel"):
        return (
            f"AppArmor probably denies tracing, because the {own} profile confines this process",
            "check: journalctl -k -g apparmor; run qemu-prefault from an unconfined root shell",
        )
    return None


def _ns_of(directory: str) -> str | None:
    try:
        return os.readlink(f"{directory}/ns/user")
    except OSError:
        return None


def _identity_map(text: str | None) -> bool:
    # user_namespaces(7): the initial namespace maps all ids to themselves.
    return text is None or text.split() == ["0", "0", "4294967295"]


def _dumpable(process: Process, status: Status) -> bool:
    # proc(5): root owns the /proc files of a process that is not dumpable.
    try:
        owner = os.stat(f"{process.proc}/stat").st_uid
    except OSError as error:
        raise gone(process.pid) from error
    return owner == status.uids[1]


def _label(directory: str) -> str | None:
    text = read_optional(f"{directory}/attr/current")
    return None if text is None else text.strip("\0\n ") or None


def ptrace_denied(process: Process) -> PtraceDeniedError:
    """Return the error for a process that this process is not allowed to trace."""
    cause, remedy = diagnose_ptrace(process)
    return PtraceDeniedError(cause, remedy)
