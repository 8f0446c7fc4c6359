# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process is the QEMU behind a monitor.

The monitor says what the guest is; ``/proc`` says who does it. The two must agree before
anything is injected anywhere: SO_PEERCRED names the process that listens on the QMP socket,
``query-cpus-fast`` names the vCPU threads, and :func:`identify` insists that the one owns the
others. A proxy in between fails that, and so does a server that lies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import Code, RefusedError, UnsupportedError
from .procfs import Process, comm_of, tgid_of, thread_map


def identify(peer_pid: int | None, given_pid: int | None, thread_ids: Sequence[int]) -> Process:
    """Return QEMU's process, if monitor, socket and kernel agree on which it is.

    :param peer_pid: who listens on the monitor socket (SO_PEERCRED); None if unknown (TCP).
    :param given_pid: the user's ``--pid``; goes before `peer_pid`, so that a monitor behind a
        proxy can be used by those who know what they do.
    :param thread_ids: the vCPU threads by ``query-cpus-fast``, in QEMU's own pid namespace.
    :raises RefusedError: code ``proxy``: the process does not own these threads.
    :raises UnsupportedError: code ``pid-namespace``: QEMU cannot be seen from here.
    :raises GoneError: if the process vanished.
    """
    pid = peer_pid if given_pid is None else given_pid
    if pid is None:
        pid = tgid_of(thread_ids[0]) if thread_ids else None
        if pid is None or not _looks_like_qemu(Process.find(pid)):
            raise UnsupportedError(
                "the QMP socket does not tell which process QEMU is",
                "give its process id with --pid; QEMU must be visible in this pid namespace",
                code=Code.PID_NAMESPACE,
            )
    if pid == os.getpid():
        raise RefusedError(
            "the QMP server claims to be this very process",
            "use QEMU's own QMP socket, or give QEMU's --pid",
            code=Code.PROXY,
        )
    process = Process.find(pid)
    if thread_ids and set(thread_ids) <= thread_map(process).keys():
        return process
    raise _mismatch(process, given_pid is not None, thread_ids)


def _mismatch(process: Process, given: bool, thread_ids: Sequence[int]) -> Exception:
    owners = {owner for owner in map(tgid_of, thread_ids) if owner is not None}
    who = f"process {process.pid} ({process.name})"
    what = f"--pid names {who}" if given else f"the QMP socket belongs to {who}"
    if not owners and _looks_like_qemu(process):
        return UnsupportedError(
            f"{what}, but its vCPU threads cannot be seen from here",
            "run qemu-prefault in the pid namespace of the host",
            code=Code.PID_NAMESPACE,
        )
    others = ", ".join(f"{owner} ({comm_of(owner)})" for owner in sorted(owners - {process.pid}))
    whose = f"which belong to process {others}" if others else "which are not its own"
    return RefusedError(
        f"{what}, but the monitor behind it speaks of other vCPU threads, {whose}",
        "a proxy seems to stand between: use QEMU's own QMP socket, or give QEMU's --pid",
        code=Code.PROXY,
    )


def _looks_like_qemu(process: Process) -> bool:
    program = os.path.basename(process.exe or "")
    return "qemu" in process.name or "qemu" in program or "kvm" in process.name
