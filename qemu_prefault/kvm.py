# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM on this host can do, and names for what its ioctl answers.

Everything is asked of the kernel, nothing is concluded from its version.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .process import Process

KVM_CAP_PRE_FAULT_MEMORY = 236
"""include/uapi/linux/kvm.h since Linux 6.11; 1 when two-dimensional paging is in use."""

#: Not errnos of the ioctl: how the prefault loop (native/prefault_loop.h) names its own ends.
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
    from ._native import lib  # noqa: PLC0415

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


def describe_errno(number: int) -> str:
    """What an outcome of a prefault range means, in one line."""
    return _OUTCOMES.get(number) or f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


_OUTCOMES = {
    STUCK: "no progress within the time limit: the vCPU holds a stale root, or its slot is being "
    "deleted (kernels without commits 20a6cff3b283 and 3ccbf6f47098)",
    ABORTED: "stopped before it was complete",
    errno.ENOENT: "no memory slot there any more",
    errno.EOPNOTSUPP: "the vCPU is in guest mode on nested tables, or KVM uses shadow paging",
    errno.EIO: "KVM refuses: the VM is dead, or belongs to another process",
    errno.EFAULT: "QEMU's mapping there cannot be accessed",
    errno.ENOMEM: "out of memory",
    errno.ENOTTY: "that file descriptor is not a vCPU, or the kernel has no such ioctl",
    errno.EINVAL: "the kernel does not know the request, or refuses it for this mapping",
    EHWPOISON: "the memory has an uncorrected hardware error",
    errno.ENOSPC: "KVM's limit of MMU pages is reached",
}
