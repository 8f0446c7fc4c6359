# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the QEMU process to which a QMP monitor belongs.

SO_PEERCRED identifies the process that listens on the QMP socket. ``query-cpus-fast`` lists the
vCPU threads. Before qemu-prefault injects code into a process, :func:`identify` checks in ``/proc``
that this process owns these threads. The check fails if the process is a proxy, or if the server
reports the thread ids of another process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import Code, RefusedError, UnsupportedError
from .peer import Peer
from .procfs import Process, comm_of, tgid_of, thread_map


def identify(
    peer_pid: int | None,
    given_pid: int | None,
    thread_ids: Sequence[int],
    peer: Peer | None = None,
) -> Process:
    """Return QEMU's process, after checking that it owns the vCPU threads.

    :param peer_pid: The pid of the process that listens on the monitor socket (SO_PEERCRED), or
        None for a socket that does not report a pid, such as a TCP socket.
    :param given_pid: The pid from ``--pid``, or None. This pid overrides ``peer_pid``, so that the
        user can reach QEMU's monitor through a proxy.
    :param thread_ids: The ids of the vCPU threads from ``query-cpus-fast``, in QEMU's own pid
        namespace.
    :param peer: The process with ``peer_pid``, to detect that the pid was reused, or None to skip
        this check.
    :raises RefusedError: If the process does not own these threads (code ``proxy``).
    :raises UnsupportedError: If QEMU is not visible in this pid namespace (code ``pid-namespace``).
    :raises GoneError: If the process has exited, or if ``peer`` has exited.
    """
    pid = peer_pid if given_pid is None else given_pid
    if pid is None:
        pid = tgid_of(thread_ids[0]) if thread_ids else None
        if pid is None or not _looks_like_qemu(Process.find(pid)):
            raise UnsupportedError(
                "the QMP socket does not identify the QEMU process",
                "specify QEMU's pid with --pid, and run qemu-prefault in a pid namespace in which "
                "QEMU is visible",
                code=Code.PID_NAMESPACE,
            )
    if pid == os.getpid():
        raise RefusedError(
            "the process that listens on the QMP socket is qemu-prefault itself",
            "use QEMU's own QMP socket, or specify QEMU's pid with --pid",
            code=Code.PROXY,
        )
    process = Process.find(pid)
    if peer is not None and given_pid is None:
        peer.check(process)
    if thread_ids and set(thread_ids) <= thread_map(process).keys():
        return process
    raise _mismatch(process, given_pid is not None, thread_ids)


def _mismatch(process: Process, given: bool, thread_ids: Sequence[int]) -> Exception:
    owners = {owner for owner in map(tgid_of, thread_ids) if owner is not None}
    who = f"process {process.pid} ({process.name})"
    what = f"--pid names {who}" if given else f"the QMP socket belongs to {who}"
    if not owners and _looks_like_qemu(process):
        return UnsupportedError(
            f"{what}, but QEMU's vCPU threads are not visible in this pid namespace",
            "run qemu-prefault in the pid namespace of the host",
            code=Code.PID_NAMESPACE,
        )
    others = ", ".join(f"{owner} ({comm_of(owner)})" for owner in sorted(owners - {process.pid}))
    whose = f"process {others}" if others else "another process"
    return RefusedError(
        f"{what}, but the monitor lists the vCPU threads of {whose}",
        "use QEMU's own QMP socket instead of a proxy's socket, or specify QEMU's pid with --pid",
        code=Code.PROXY,
    )


def _looks_like_qemu(process: Process) -> bool:
    program = os.path.basename(process.exe or "")
    return "qemu" in process.name or "qemu" in program or "kvm" in process.name
