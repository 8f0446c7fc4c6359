# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's KVM descriptors: their numbers, and how to have one here."""

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
    """Numbers, in QEMU, of its KVM descriptors.

    `vcpus` and `vcpu_stats` (KVM_GET_STATS_FD; QEMU keeps them open since 8.1) are keyed by
    KVM's vcpu id, the APIC id.
    """

    vm: int | None = None
    kvm: int | None = None
    vcpus: MappingABC[int, int] = field(default_factory=dict)
    vcpu_stats: MappingABC[int, int] = field(default_factory=dict)


_VCPU_LINK: Final = re.compile(r"anon_inode:kvm-vcpu(-stats)?:([0-9]{1,9})")


def parse_kvm_fds(links: Iterable[tuple[int, str]]) -> KvmFds:
    """Pick KVM's descriptors from (number, link target) pairs (virt/kvm/kvm_main.c).

    :raises UnsupportedError: if there are two VMs in the process: then vCPU 0 may be either's.
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
                    "only a QEMU with one guest can be prefaulted from outside",
                )
            vm = number
        elif target == "/dev/kvm" and kvm is None:
            kvm = number
    return KvmFds(vm, kvm, vcpus, vcpu_stats)


def kvm_fds(process: Process) -> KvmFds:
    """Return the numbers of a process's KVM descriptors.

    :raises UnsupportedError: if its descriptors may not be listed.
    """
    links = ((int(n), process.link(f"fd/{n}")) for n in process.listdir("fd") if n.isdecimal())
    return parse_kvm_fds((number, link) for number, link in links if link is not None)


def take_fd(process: Process, number: int) -> int:
    """Duplicate a process's descriptor ``number`` into this process (pidfd_getfd(2), Linux 5.6).

    The caller closes it: while it is open, so is what it stands for, even if QEMU ends.

    :raises GoneError: if the process or its descriptor is gone.
    :raises PtraceDeniedError: if that may not be done; it takes the right to ptrace.
    """
    from .._native import lib  # noqa: PLC0415

    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError as error:
        raise gone(process.pid) from error
    try:
        process.check()  # from here on the pidfd pins it
        answer = int(lib.take_fd(pidfd, number))
    finally:
        os.close(pidfd)
    if answer >= 0:
        return answer
    if answer == -errno.EPERM:
        raise PtraceDeniedError(
            f"descriptor {number} of process {process.pid} may not be taken", "run as root"
        )
    if answer in (-errno.ESRCH, -errno.EBADF):
        raise GoneError(
            f"descriptor {number} of process {process.pid} is gone", "try again while QEMU runs"
        )
    raise FailedError(
        f"descriptor {number} of process {process.pid} cannot be taken: {os.strerror(-answer)}",
        "pidfd_getfd(2) came with Linux 5.6; a seccomp filter may also forbid it",
        code=Code.PIDFD,
    )
