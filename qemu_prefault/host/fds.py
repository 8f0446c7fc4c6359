# SPDX-License-Identifier: GPL-2.0-or-later
"""Find QEMU's KVM file descriptors, and duplicate them into this process."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Final

from ..errors import Code, FailedError, GoneError, PtraceDeniedError, UnsupportedError
from .procfs import Process, gone


@dataclass(frozen=True, slots=True)
class KvmFds:
    """The numbers of QEMU's KVM file descriptors.

    The keys of ``vcpus`` and ``vcpu_stats`` are KVM's vCPU ids, which are APIC ids on x86. The
    values are numbers of descriptors. KVM_GET_STATS_FD returns the descriptors in ``vcpu_stats``.
    QEMU 8.1 and later keep these descriptors open (``kvm_init_vcpu()``, accel/kvm/kvm-all.c).
    """

    vm: int | None = None
    kvm: int | None = None
    vcpus: MappingABC[int, int] = field(default_factory=dict)
    vcpu_stats: MappingABC[int, int] = field(default_factory=dict)


_VCPU_LINK: Final = re.compile(r"anon_inode:kvm-vcpu(-stats)?:([0-9]{1,9})")


def parse_kvm_fds(links: Iterable[tuple[int, str]]) -> KvmFds:
    """Return the KVM descriptors among the descriptors of a process.

    virt/kvm/kvm_main.c defines the link targets of KVM's descriptors.

    :param links: Pairs of a descriptor's number and its link target in ``/proc/PID/fd``.
    :raises UnsupportedError: If the process runs more than one VM.
    """
    vm = kvm = None
    vcpus: dict[int, int] = {}
    vcpu_stats: dict[int, int] = {}
    for number, target in sorted(links):
        match = _VCPU_LINK.fullmatch(target)
        if match is not None:
            (vcpu_stats if match[1] else vcpus).setdefault(int(match[2]), number)
        elif target == "anon_inode:kvm-vm":
            if vm is not None:
                raise UnsupportedError(
                    "the process runs more than one KVM guest",
                    "use a QEMU process that runs only one guest",
                )
            vm = number
        elif target == "/dev/kvm" and kvm is None:
            kvm = number
    return KvmFds(vm, kvm, vcpus, vcpu_stats)


def kvm_fds(process: Process) -> KvmFds:
    """Return the numbers of a process's KVM descriptors.

    :raises UnsupportedError: If this process has no permission to list the descriptors.
    """
    links = ((int(n), process.link(f"fd/{n}")) for n in process.listdir("fd") if n.isdecimal())
    return parse_kvm_fds((number, link) for number, link in links if link is not None)


def take_fd(process: Process, number: int) -> int:
    """Duplicate a process's descriptor ``number`` into this process.

    This function uses pidfd_getfd(2), which needs Linux 5.6. The caller must close the duplicate.
    While the duplicate is open, the open file exists even after QEMU has exited.

    :returns: The number of the duplicate.
    :raises GoneError: If the process or the descriptor no longer exists.
    :raises PtraceDeniedError: If this process has no permission to trace the other process.
    :raises FailedError: If the kernel refuses pidfd_getfd(2) for another reason.
    """
    from .._native import lib  # noqa: PLC0415

    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError as error:
        raise gone(process.pid) from error
    try:
        process.check()  # the pidfd now refers to this process, even if the pid is reused
        answer = int(lib.take_fd(pidfd, number))
    finally:
        os.close(pidfd)
    if answer >= 0:
        return answer
    if answer == -errno.EPERM:
        raise PtraceDeniedError(
            f"this process has no permission to duplicate descriptor {number} of process "
            f"{process.pid}",
            "run qemu-prefault as root",
        )
    if answer in (-errno.ESRCH, -errno.EBADF):
        raise GoneError(
            f"descriptor {number} of process {process.pid} is closed",
            "check whether QEMU is still running, and run qemu-prefault again",
        )
    raise FailedError(
        f"cannot duplicate descriptor {number} of process {process.pid}: {os.strerror(-answer)}",
        "check that the kernel is Linux 5.6 or newer, and that no seccomp filter of this process "
        "denies pidfd_getfd(2)",
        code=Code.PIDFD,
    )
