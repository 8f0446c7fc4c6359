# SPDX-License-Identifier: GPL-2.0-or-later
"""``/dev/kvm`` and its ioctls."""

from __future__ import annotations

import functools
import os
import struct

from .._native import ffi, lib
from ..host.kvm import KVM_CAP_PRE_FAULT_MEMORY
from . import abi

IOCTL_LIMIT_SECONDS = 20.0
"""No ioctl of a case lasts longer, under emulation either, unless it never ends."""
HANG_SECONDS = 0.3
"""Where a case expects an ioctl that may never end: after so long it is interrupted."""


def ioctl(fd: int, request: int, argument: int | bytearray | bytes = 0) -> int:
    """An ioctl; a buffer is written back to if it is a bytearray. Raises OSError."""
    value = argument if isinstance(argument, int) else address_of(argument)
    answer = int(lib.pf_vmm_ioctl(fd, request, value))
    if answer < 0:
        raise OSError(-answer, f"KVM ioctl {request & 0xFFFF:#06x}: {os.strerror(-answer)}")
    return answer


def address_of(data: bytearray | bytes) -> int:
    # Alive as long as the buffer is: the caller holds it during the call.
    return int(ffi.cast("uintptr_t", ffi.from_buffer(data)))


@functools.cache
def kvm_fd() -> int:
    """A descriptor of /dev/kvm."""
    lib.pf_vmm_init()
    return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)


@functools.cache
def supported_cpuid() -> bytes:
    """``struct kvm_cpuid2`` with all that this KVM offers."""
    entries = 256
    data = bytearray(struct.pack("<II", entries, 0) + bytes(40 * entries))
    ioctl(kvm_fd(), abi.GET_SUPPORTED_CPUID, data)
    (count,) = struct.unpack_from("<I", data)
    return bytes(data[: 8 + 40 * count])


@functools.cache
def offers_prefault() -> bool:
    """Whether this kernel's KVM says that it can (KVM_CAP_PRE_FAULT_MEMORY)."""
    return ioctl(kvm_fd(), abi.CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY) > 0
