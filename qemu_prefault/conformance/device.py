# SPDX-License-Identifier: GPL-2.0-or-later
"""Access to ``/dev/kvm`` and its ioctls."""

from __future__ import annotations

import functools
import os
import struct

from .._native import ffi, lib
from ..host.kvm import KVM_CAP_PRE_FAULT_MEMORY
from . import abi

#: Maximum duration of an ioctl in seconds. An ioctl that takes longer counts as hung. On an
#: emulated machine, if the host is busy, the first access to a 1 GiB page can take more than 20 s.
IOCTL_LIMIT_SECONDS = 120.0
#: Time in seconds after which a case interrupts an ioctl that might hang.
HANG_SECONDS = 0.3


def ioctl(fd: int, request: int, argument: int | bytearray | bytes = 0) -> int:
    """Issue an ioctl and return the result of the system call.

    :param argument: An integer, or a buffer whose address is passed to the kernel. Pass a
        bytearray if the kernel writes to the buffer.
    :raises OSError: If the ioctl fails.
    """
    value = argument if isinstance(argument, int) else address_of(argument)
    answer = int(lib.pf_vmm_ioctl(fd, request, value))
    if answer < 0:
        raise OSError(-answer, f"KVM ioctl {request & 0xFFFF:#06x}: {os.strerror(-answer)}")
    return answer


def address_of(data: bytearray | bytes) -> int:
    # The address is valid only while the caller holds a reference to the buffer.
    return int(ffi.cast("uintptr_t", ffi.from_buffer(data)))


@functools.cache
def kvm_fd() -> int:
    """Return a descriptor of ``/dev/kvm``, which the first call opens."""
    lib.pf_vmm_init()
    return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)


@functools.cache
def supported_cpuid() -> bytes:
    """Return a ``struct kvm_cpuid2`` with all CPU features that this KVM supports."""
    entries = 256
    data = bytearray(struct.pack("<II", entries, 0) + bytes(40 * entries))
    ioctl(kvm_fd(), abi.GET_SUPPORTED_CPUID, data)
    (count,) = struct.unpack_from("<I", data)
    return bytes(data[: 8 + 40 * count])


@functools.cache
def offers_prefault() -> bool:
    """Return whether this KVM reports KVM_CAP_PRE_FAULT_MEMORY."""
    return ioctl(kvm_fd(), abi.CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY) > 0
