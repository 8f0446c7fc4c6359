# SPDX-License-Identifier: GPL-2.0-or-later
"""Find QEMU's KVM file descriptors, and duplicate them into this process."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Final

from ..errors import Code, FailedError, GoneError, PtraceDeniedError, UnsupportedError
from .foreign_fds import close_foreign
from .proc_files import gone
from .procfs import Process


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


def vcpu_stats_link(vcpu_id: int) -> str:
    """Return the link target of the statistics descriptor of a vCPU."""
    return f"anon_inode:kvm-vcpu-stats:{vcpu_id}"


def take_fd(process: Process, number: int, expected: str | None = None) -> int:
    """Duplicate a process's descriptor ``number`` into this process.

    This function uses pidfd_getfd(2), which needs Linux 5.6. The caller must close the duplicate.
    While the duplicate is open, the open file exists even after QEMU has exited.

    :param expected: The link target that the descriptor must have, for example
        ``anon_inode:kvm-vcpu:0``. The process can replace the descriptor after this process has
        read its link. Therefore the function reads the link of the duplicate.
    :returns: The number of the duplicate.
    :raises GoneError: If the process or the descriptor no longer exists, or if the descriptor is
        not the expected one.
    :raises PtraceDeniedError: If this process has no permission to trace the other process.
    :raises FailedError: If the kernel refuses pidfd_getfd(2) for another reason.
    """
    from .._native import lib  # noqa: PLC0415

    pidfd, close = _pidfd_of(process)
    try:
        process.check()  # the pidfd now refers to this process, even if the pid is reused
        answer = int(lib.take_fd(pidfd, number))
    finally:
        if close:
            os.close(pidfd)
    if answer >= 0:
        return answer if expected is None else _checked(process, number, answer, expected)
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


def _pidfd_of(process: Process) -> tuple[int, bool]:
    """Return a descriptor of the process, and whether the caller must close it."""
    if process.pin is not None and process.pin.pidfd >= 0:
        return process.pin.pidfd, False
    try:
        return os.pidfd_open(process.pid), True
    except ProcessLookupError as error:
        raise gone(process.pid) from error


def _checked(process: Process, number: int, duplicate: int, expected: str) -> int:
    """Return the duplicate if it is the expected descriptor, and close it otherwise."""
    found = os.readlink(f"/proc/self/fd/{duplicate}")
    # Other processes can choose the names of files and of directories. A link to a file starts with
    # a slash, unless the file is on a kernel-internal mount. These files have a type.
    if found == expected and stat.S_IFMT(os.fstat(duplicate).st_mode) == 0:
        return duplicate
    close_foreign(duplicate)
    raise GoneError(
        f"descriptor {number} of process {process.pid} is {found!r} and no longer {expected!r}",
        "check whether QEMU has unplugged a vCPU, and run qemu-prefault again",
    )
