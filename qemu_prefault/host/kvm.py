# SPDX-License-Identifier: GPL-2.0-or-later
"""Query KVM's capabilities and counters, and describe the errors of prefaulting.

All results come from the running kernel. No result depends on the kernel's version number.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import QemuPrefaultError
from .bounded import DEFAULT_LIMIT, pread_bounded, read_bounded
from .fds import kvm_fds
from .inside_root import open_inside, reopened

if TYPE_CHECKING:
    from .procfs import Process

#: From include/uapi/linux/kvm.h since Linux 6.11. KVM_CHECK_EXTENSION returns 1 if
#: two-dimensional paging is in use.
KVM_CAP_PRE_FAULT_MEMORY = 236
#: The device number of ``/dev/kvm`` (MISC_MAJOR and KVM_MINOR, include/linux/miscdevice.h).
KVM_DEVICE: Final = os.makedev(10, 232)

#: Error of the prefault loop (native/common/prefault_loop.h): a range made no progress within the
#: time limit. The ioctl never returns this error.
STUCK = errno.ETIME
#: Error of the prefault loop: the batch was aborted. The ioctl never returns this error.
ABORTED = errno.ECANCELED

#: ``EHWPOISON``, which the errno module of some Python versions does not define.
EHWPOISON = 133


@dataclass(frozen=True, slots=True)
class Capability:
    """The result of querying ``KVM_PRE_FAULT_MEMORY`` on this host.

    :ivar available: Whether the ioctl can work, or None if ``/dev/kvm`` could not be opened.
    :ivar reason: The reason why ``available`` is not True, or an empty string.
    :ivar remedy: How to make the ioctl available, or an empty string.
    """

    available: bool | None
    reason: str
    remedy: str = ""


def parameter(module: str, name: str) -> str | None:
    """Return the value of a kernel module's parameter, for example ``Y`` or ``1``.

    The result is None if sysfs does not contain the parameter.
    """
    try:
        text = read_bounded(f"/sys/module/{module}/parameters/{name}", DEFAULT_LIMIT)
    except OSError:
        return None
    return text.decode(errors="replace").strip()


def is_on(value: str | None) -> bool:
    """Return whether the value of a module's parameter means "on"."""
    return value in ("Y", "1", "y")


def _off(value: str | None) -> bool:
    return value in ("N", "0", "n")


@dataclass(frozen=True, slots=True)
class Paging:
    """How KVM on this host translates guest-physical addresses.

    :ivar name: ``NPT``, ``EPT`` or ``shadow``.
    :ivar ad_bits: True if stage-2 entries have accessed and dirty bits. Only EPT can lack them, on
        CPUs before Haswell and with ``kvm_intel.eptad=0``. KVM then makes a prefaulted entry
        inaccessible, to detect the first access (mmu/spte.c:mark_spte_for_access_track()).
    :ivar pml: True if the CPU logs dirty pages (page modification logging), so that KVM need not
        write-protect them. Only EPT has this feature, and only with accessed and dirty bits.
    """

    name: str
    ad_bits: bool = True
    pml: bool = False


def paging() -> Paging | None:
    """Return how KVM on this host translates guest-physical addresses.

    The result is None if sysfs contains the parameters of neither KVM module.
    """
    npt, ept = parameter("kvm_amd", "npt"), parameter("kvm_intel", "ept")
    if npt is None and ept is None:
        return None
    if is_on(npt):
        return Paging("NPT")
    if is_on(ept):
        ad_bits, pml = (is_on(parameter("kvm_intel", name)) for name in ("eptad", "pml"))
        return Paging("EPT", ad_bits, pml)
    return Paging("shadow")


def pre_fault_capability(process: Process | None = None) -> Capability:
    """Return whether KVM offers ``KVM_PRE_FAULT_MEMORY``, and why not if it does not.

    The result is the same for all VMs, because the capability's value is ``tdp_enabled``
    (arch/x86/kvm/x86.c). If this process cannot open ``/dev/kvm``, the function opens ``/dev/kvm``
    in QEMU's root directory instead.

    :param process: QEMU, or None to try only this process's ``/dev/kvm``.
    """
    from .._native import lib  # noqa: PLC0415

    problem = ""
    for owner in (None, process)[: 1 if process is None else 2]:
        try:
            fd = _open_kvm(owner)
        except OSError as error:
            where = "" if owner is None else f"/proc/{owner.pid}/root"
            problem = f"{where}/dev/kvm: {error.strerror}"
            continue
        except QemuPrefaultError as error:
            problem = error.cause
            continue
        try:
            answer = lib.kvm_check_extension(fd, KVM_CAP_PRE_FAULT_MEMORY)
        finally:
            os.close(fd)
        return Capability(True, "") if answer > 0 else _why_not()
    return Capability(
        None,
        f"KVM cannot be queried ({problem})",
        "run qemu-prefault as root, or as a member of the kvm group",
    )


def _open_kvm(process: Process | None) -> int:
    """Open this process's ``/dev/kvm``, or the one in QEMU's root directory.

    QEMU controls its root directory. Another device at this path, for example a watchdog, is not
    opened, because this could have an effect.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    if process is None:
        return os.open("/dev/kvm", flags)
    with open_inside(process, "/dev/kvm") as found:
        _check_kvm(found)
        fd = os.open(reopened(found), flags)
    try:
        _check_kvm(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_kvm(fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != KVM_DEVICE:
        raise OSError(errno.ENODEV, "the file is not the KVM device")


def _why_not() -> Capability:
    for module, name, paging in (("kvm_amd", "npt", "NPT"), ("kvm_intel", "ept", "EPT")):
        if _off(parameter(module, name)):
            return Capability(
                False,
                f"KVM on this host uses shadow paging ({module}.{name}={parameter(module, name)})",
                f"load {module} with {name}=1 if the hardware has {paging}, or use --populate-only "
                "to allocate the guest's memory in advance without the ioctl",
            )
    return Capability(
        False,
        "this kernel's KVM has no KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY is 0)",
        "use Linux 6.11 or newer with two-dimensional paging (EPT or NPT), or use --populate-only "
        "to allocate the guest's memory in advance without the ioctl",
    )


class BinaryStats:
    """The counters that a KVM statistics descriptor contains.

    A KVM_GET_STATS_FD ioctl in this process or another process has returned the descriptor.
    Documentation/virt/kvm/api.rst, section 4.133, describes the format. The caller opens and closes
    the descriptor. A descriptor of another process may be any file, so all numbers in its header
    are limited. See the ``expected`` parameter of :func:`~.fds.take_fd`.

    :raises OSError: If the descriptor cannot be read, or if it is not a statistics descriptor.
    """

    #: KVM has about 60 counters, with names of 48 bytes (KVM_STATS_NAME_SIZE).
    _MAX_COUNTERS, _MAX_NAME, _MAX_DATA = 4096, 256, 1 << 20

    _HEADER = struct.Struct("<6I")  # struct kvm_stats_header
    _DESCRIPTOR = struct.Struct("<IhHII")  # struct kvm_stats_desc; the name follows it

    def __init__(self, fd: int) -> None:
        self.fd = fd
        header = pread_bounded(fd, self._HEADER.size, 0)
        if len(header) != self._HEADER.size:
            raise self._malformed()
        _, name_size, count, _, at, self._data = self._HEADER.unpack(header)
        if name_size > self._MAX_NAME or not 0 < count <= self._MAX_COUNTERS:
            raise self._malformed()
        size = self._DESCRIPTOR.size + name_size
        table = pread_bounded(fd, size * count, at)
        if len(table) != size * count:
            raise self._malformed()
        self._offsets: dict[str, int] = {}
        for start in range(0, len(table), size):
            name = table[start + self._DESCRIPTOR.size : start + size].split(b"\0")[0]
            offset = self._DESCRIPTOR.unpack_from(table, start)[3]
            self._offsets[name.decode(errors="replace")] = offset
        self._length = max(self._offsets.values()) + 8
        if self._length > self._MAX_DATA:
            raise self._malformed()

    @staticmethod
    def _malformed() -> OSError:
        return OSError(errno.EINVAL, "the descriptor is not a KVM statistics descriptor")

    def read(self, *names: str) -> list[int]:
        """Return the values of counters at one point in time.

        The value of an unknown counter is 0.

        :raises OSError: If the descriptor cannot be read.
        """
        data = pread_bounded(self.fd, self._length, self._data)
        if len(data) != self._length:
            raise self._malformed()
        offsets = [self._offsets.get(name) for name in names]
        return [0 if at is None else int(struct.unpack_from("<Q", data, at)[0]) for at in offsets]


def pre_fault_here(vcpu_fd: int, gpa: int, size: int) -> int:
    """Call ``KVM_PRE_FAULT_MEMORY`` from this process, and return its errno or 0.

    If the vCPU belongs to another process's VM, the ioctl fails immediately with EIO, because
    ``kvm_vcpu_ioctl()`` (virt/kvm/kvm_main.c) compares ``kvm->mm`` with the caller's mm (kernel
    commit 6d4e4c4fca5b, Linux 2.6.25). This check precedes the wait for ``vcpu->mutex``, which the
    thread of a running vCPU holds. The purpose of this function is to demonstrate this error. The
    agents call the ioctl inside QEMU.

    :param gpa: The guest-physical address, page aligned.
    :param size: The size in bytes, page aligned.
    """
    from .._native import lib  # noqa: PLC0415

    return -int(lib.kvm_pre_fault(vcpu_fd, gpa, size))


def describe_errno(number: int) -> str:
    """Return one line that explains an error of the prefault loop or the ioctl."""
    return _OUTCOMES.get(number) or f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


_OUTCOMES = {
    STUCK: "no progress within the time limit: the vCPU holds a stale root, or QEMU is deleting "
    "the memory slot (on kernels without commits 20a6cff3b283 and 3ccbf6f47098)",
    ABORTED: "the run ended before the range was complete",
    errno.ENOENT: "KVM has no memory slot at this address",
    errno.EOPNOTSUPP: "the vCPU runs a nested guest, or KVM uses shadow paging",
    errno.EIO: "KVM refuses: the VM is dead, or the VM belongs to another process",
    errno.EFAULT: "QEMU's mapping of this memory cannot be accessed, or its file system or huge "
    "page pool is full",
    errno.ENOMEM: "out of memory",
    errno.ENOTTY: "the file descriptor is not a vCPU, or the kernel does not support the ioctl",
    errno.EINVAL: "the kernel does not support the request, or refuses it for this mapping",
    EHWPOISON: "the memory has an uncorrected hardware error",
    errno.EBUSY: "dirty pages are being logged, or the guest's memory is being loaded",
    errno.ENOSPC: "KVM's limit on MMU pages is reached",
}


@dataclass(frozen=True, slots=True)
class Stage2Leaves:
    """The number of leaf entries in the guest's stage-2 tables, by page size."""

    #: Leaves of 4 KiB.
    pages_4k: int
    #: Leaves of 2 MiB.
    pages_2m: int = 0
    #: Leaves of 1 GiB.
    pages_1g: int = 0

    def __sub__(self, other: Stage2Leaves) -> Stage2Leaves:
        return Stage2Leaves(
            self.pages_4k - other.pages_4k,
            self.pages_2m - other.pages_2m,
            self.pages_1g - other.pages_1g,
        )

    @property
    def bytes(self) -> int:
        """The number of bytes of guest memory that these leaves map."""
        return (self.pages_4k << 12) + (self.pages_2m << 21) + (self.pages_1g << 30)

    def __str__(self) -> str:
        return f"{self.pages_4k} x 4K + {self.pages_2m} x 2M + {self.pages_1g} x 1G"


DEBUGFS: Final = Path("/sys/kernel/debug/kvm")


def debugfs_leaves(process: Process) -> Stage2Leaves | None:
    """Return KVM's counts of stage-2 leaves from debugfs.

    The result is None if this process cannot read the counts.
    """
    counts = _read_counts(process, tuple(Stage2Leaves.__dataclass_fields__))
    return None if counts is None else Stage2Leaves(*counts)


def debugfs_faults(process: Process) -> int | None:
    """Return the sum of the ``pf_taken`` counter over all vCPUs from debugfs.

    The result is None if this process cannot read the counter.
    """
    counts = _read_counts(process, ("pf_taken",))
    return None if counts is None else counts[0]


def _read_counts(process: Process, names: Sequence[str]) -> list[int] | None:
    """Return counters from the VM's directory in debugfs.

    The result is None if this process cannot read the counters.
    """
    # kvm_create_vm_debugfs() (virt/kvm/kvm_main.c) names the directory PID-FD. PID is the process
    # that created the VM, and FD is the number of the VM's file descriptor in that process.
    try:
        directory = DEBUGFS / f"{process.pid}-{kvm_fds(process).vm}"
        return [int(read_bounded(str(directory / name), DEFAULT_LIMIT)) for name in names]
    except (OSError, ValueError):
        return None
