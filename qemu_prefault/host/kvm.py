# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM on this host can do, and names for what its ioctl answers.

Everything is asked of the kernel, nothing is concluded from its version.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .fds import kvm_fds

if TYPE_CHECKING:
    from .procfs import Process

KVM_CAP_PRE_FAULT_MEMORY = 236
"""include/uapi/linux/kvm.h since Linux 6.11; 1 when two-dimensional paging is in use."""

#: Not errnos of the ioctl: how the prefault loop (common/prefault_loop.h) names its own ends.
STUCK = errno.ETIME
ABORTED = errno.ECANCELED

EHWPOISON = 133  # not in every Python's errno module


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether ``KVM_PRE_FAULT_MEMORY`` can work on this host.

    ``available`` is None when nobody could be asked (no access to ``/dev/kvm``).
    """

    available: bool | None
    reason: str
    remedy: str = ""


def parameter(module: str, name: str) -> str | None:
    """A module parameter as sysfs shows it (``Y``, ``N``, ``1``…), or None."""
    try:
        return Path(f"/sys/module/{module}/parameters/{name}").read_text().strip()
    except OSError:
        return None


def _off(value: str | None) -> bool:
    return value in ("N", "0", "n")


def pre_fault_capability(process: Process | None = None) -> Capability:
    """Ask ``KVM_CHECK_EXTENSION(KVM_CAP_PRE_FAULT_MEMORY)`` and explain a "no".

    The answer is kernel-wide (arch/x86/kvm/x86.c returns ``tdp_enabled``), so any
    ``/dev/kvm`` does: ours, or the one QEMU has open when ours is out of reach.
    """
    from .._native import lib  # noqa: PLC0415

    candidates = ["/dev/kvm"]
    if process is not None:
        candidates.append(f"/proc/{process.pid}/root/dev/kvm")
    problem = ""
    for path in candidates:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            continue
        try:
            answer = lib.kvm_check_extension(fd, KVM_CAP_PRE_FAULT_MEMORY)
        finally:
            os.close(fd)
        return Capability(True, "") if answer > 0 else _why_not()
    return Capability(None, f"KVM could not be asked ({problem})", "run as root, or in group kvm")


def _why_not() -> Capability:
    for module, name, paging in (("kvm_amd", "npt", "NPT"), ("kvm_intel", "ept", "EPT")):
        if _off(parameter(module, name)):
            return Capability(
                False,
                f"KVM uses shadow paging here ({module}.{name}={parameter(module, name)})",
                f"Load {module} with {name}=1 where the hardware has {paging}. "
                "Without it --populate-only still helps: it spares the guest the host's faults.",
            )
    return Capability(
        False,
        "this kernel's KVM has no KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY is 0)",
        "It needs Linux 6.11 or newer and two-dimensional paging (EPT or NPT). "
        "Without it --populate-only still helps: it spares the guest the host's faults.",
    )


class BinaryStats:
    """The counters behind a descriptor of ``KVM_GET_STATS_FD``, whoever has it.

    Its format is in Documentation/virt/kvm/api.rst, 4.133. It is closed by who opened it.

    :raises OSError: if it cannot be read, or is something else.
    """

    _HEADER = struct.Struct("<6I")  # struct kvm_stats_header
    _DESCRIPTOR = struct.Struct("<IhHII")  # struct kvm_stats_desc; then comes the name

    def __init__(self, fd: int) -> None:
        self.fd = fd
        header = os.pread(fd, self._HEADER.size, 0)
        if len(header) != self._HEADER.size:
            raise OSError(errno.EINVAL, "no statistics of KVM")
        _, name_size, count, _, at, self._data = self._HEADER.unpack(header)
        size = self._DESCRIPTOR.size + name_size
        table = os.pread(fd, size * count, at)
        self._offsets: dict[str, int] = {}
        for start in range(0, len(table), size):
            name = table[start + self._DESCRIPTOR.size : start + size].split(b"\0")[0].decode()
            self._offsets[name] = self._DESCRIPTOR.unpack_from(table, start)[3]
        self._length = max(self._offsets.values()) + 8

    def read(self, *names: str) -> list[int]:
        """The values of these, from one look; 0 for those this kernel does not have."""
        data = os.pread(self.fd, self._length, self._data)
        offsets = [self._offsets.get(name) for name in names]
        return [0 if at is None else int(struct.unpack_from("<Q", data, at)[0]) for at in offsets]


def pre_fault_here(vcpu_fd: int, gpa: int, size: int) -> int:
    """Call ``KVM_PRE_FAULT_MEMORY`` from this very process; return the errno, 0 for success.

    On a vCPU of another process's VM that is EIO, always and at once: ``kvm_vcpu_ioctl()``
    (virt/kvm/kvm_main.c) compares ``kvm->mm`` with the caller's mm before it looks at the
    request, and before it waits for ``vcpu->mutex``, which a running vCPU holds (kernel commit
    6d4e4c4fca5b, 2.6.25). It is here to show that; agents do it inside QEMU.

    :param gpa: guest-physical address; like ``size``, in bytes and page aligned.
    """
    from .._native import lib  # noqa: PLC0415

    return -int(lib.kvm_pre_fault(vcpu_fd, gpa, size))


def describe_errno(number: int) -> str:
    """What an outcome of a prefault range means, in one line."""
    return _OUTCOMES.get(number) or f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


_OUTCOMES = {
    STUCK: "no progress within the time limit: the vCPU holds a stale root, or its slot is being "
    "deleted (kernels without commits 20a6cff3b283 and 3ccbf6f47098)",
    ABORTED: "stopped before it was complete",
    errno.ENOENT: "no memory slot there any more",
    errno.EOPNOTSUPP: "it runs a nested guest, or KVM uses shadow paging",
    errno.EIO: "KVM refuses: the VM is dead, or belongs to another process",
    errno.EFAULT: "QEMU's mapping there cannot be accessed, or its file system or huge page pool "
    "is full",
    errno.ENOMEM: "out of memory",
    errno.ENOTTY: "that file descriptor is not a vCPU, or the kernel has no such ioctl",
    errno.EINVAL: "the kernel does not know the request, or refuses it for this mapping",
    EHWPOISON: "the memory has an uncorrected hardware error",
    errno.EBUSY: "dirty pages are being logged, or the guest is being loaded",
    errno.ENOSPC: "KVM's limit of MMU pages is reached",
}


@dataclass(frozen=True, slots=True)
class Stage2Leaves:
    """Leaf entries in the guest's stage-2 tables, by page size: counts, not bytes."""

    pages_4k: int
    pages_2m: int = 0
    pages_1g: int = 0

    def __sub__(self, other: Stage2Leaves) -> Stage2Leaves:
        return Stage2Leaves(
            self.pages_4k - other.pages_4k,
            self.pages_2m - other.pages_2m,
            self.pages_1g - other.pages_1g,
        )

    @property
    def bytes(self) -> int:
        """Guest memory these leaves map."""
        return (self.pages_4k << 12) + (self.pages_2m << 21) + (self.pages_1g << 30)

    def __str__(self) -> str:
        return f"{self.pages_4k} x 4K + {self.pages_2m} x 2M + {self.pages_1g} x 1G"


DEBUGFS: Final = Path("/sys/kernel/debug/kvm")


def debugfs_leaves(process: Process) -> Stage2Leaves | None:
    """KVM's counts of stage-2 leaves, from debugfs; None where that is not to be had."""
    counts = _read_counts(process, tuple(Stage2Leaves.__dataclass_fields__))
    return None if counts is None else Stage2Leaves(*counts)


def debugfs_faults(process: Process) -> int | None:
    """KVM's ``pf_taken`` of all vCPUs, likewise."""
    counts = _read_counts(process, ("pf_taken",))
    return None if counts is None else counts[0]


def _read_counts(process: Process, names: Sequence[str]) -> list[int] | None:
    """KVM names a VM's directory by the pid and the descriptor that it was created with
    (kvm_create_vm_debugfs(), virt/kvm/kvm_main.c).
    """
    try:
        directory = DEBUGFS / f"{process.pid}-{kvm_fds(process).vm}"
        return [int((directory / name).read_text()) for name in names]
    except (OSError, ValueError):
        return None
