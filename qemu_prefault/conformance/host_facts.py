# SPDX-License-Identifier: GPL-2.0-or-later
"""Features and settings of this host on which the cases depend."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from .._native import lib
from ..errors import Code, UnsupportedError
from ..host.kvm import KVM_CAP_PRE_FAULT_MEMORY, is_on, paging, parameter
from ..units import PAGE_SIZE
from . import abi, device
from .features import has_ad_bits
from .vmm import KvmVm


@dataclass(frozen=True)
class HostFacts:
    """The kernel release, and the features and settings of the kernel and KVM.

    :ivar capability: True if KVM reports KVM_CAP_PRE_FAULT_MEMORY.
    :ivar refusal: The errno with which a valid prefault fails, or 0 if the prefault succeeds.
    :ivar paging: ``NPT``, ``EPT`` or ``shadow``.
    :ivar tdp_mmu: True if KVM uses the TDP MMU (``kvm.tdp_mmu``).
    :ivar ad_bits: True if stage-2 entries have accessed and dirty bits. With
        ``kvm_intel.eptad=0``, they do not have these bits.
    :ivar thp: True if transparent huge pages are enabled.
    :ivar hugepages: The numbers of free hugetlb pages of 2 MiB and of 1 GiB.
    """

    kernel: str
    capability: bool
    refusal: int
    paging: str
    tdp_mmu: bool
    ad_bits: bool
    vm_types: int
    quirks: int
    smm: bool
    dirty_ring: bool
    gmem_flags: int
    nested: bool
    thp: bool
    hugepages: tuple[int, int]
    ksm: bool
    root: bool

    @property
    def mode(self) -> str:
        """The paging mode, as the commands print it."""
        if self.paging == "shadow":
            return "shadow paging"
        return self.paging + ("" if self.tdp_mmu else ", tdp_mmu=0")


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _free(kib: int) -> int:
    return int(_text(f"/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages") or 0)


def read_host_facts() -> HostFacts:
    """Return the features and settings of this host.

    :raises UnsupportedError: If ``/dev/kvm`` cannot be opened.
    """
    try:
        kvm_fd = device.kvm_fd()
    except OSError as error:
        raise UnsupportedError(
            f"/dev/kvm cannot be opened: {error.strerror}",
            "if /dev/kvm does not exist, load kvm_amd or kvm_intel, or enable virtualization in "
            "the firmware\n"
            "if permission is denied, run qemu-prefault as root, or as a member of the kvm group",
            code=Code.NO_KVM,
        ) from error

    def check(capability: int) -> int:
        return max(0, int(lib.pf_vmm_ioctl(kvm_fd, abi.CHECK_EXTENSION, capability)))

    capability = check(KVM_CAP_PRE_FAULT_MEMORY) > 0
    found = paging()
    return HostFacts(
        kernel=os.uname().release,
        capability=capability,
        refusal=_refusal(),
        paging="shadow" if found is None else found.name,
        tdp_mmu=is_on(parameter("kvm", "tdp_mmu")),
        ad_bits=has_ad_bits(),
        vm_types=check(abi.CAP_VM_TYPES),
        quirks=check(abi.CAP_DISABLE_QUIRKS2),
        smm=check(abi.CAP_X86_SMM) > 0,
        dirty_ring=check(abi.CAP_DIRTY_LOG_RING) > 0,
        gmem_flags=check(abi.CAP_GUEST_MEMFD_FLAGS),
        nested=any(is_on(parameter(module, "nested")) for module in ("kvm_amd", "kvm_intel")),
        thp="[never]" not in _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        hugepages=(_free(2048), _free(1048576)),
        ksm=_text("/sys/kernel/mm/ksm/run") == "1",
        root=os.geteuid() == 0,
    )


def _refusal() -> int:
    """Prefault a present page, and return the errno, or 0 if the ioctl succeeds."""
    vm = KvmVm()
    vcpu = vm.vcpu()
    arguments = bytearray(struct.pack("<8Q", 0, PAGE_SIZE, *[0] * 6))
    try:
        device.ioctl(vcpu.fd, abi.PRE_FAULT_MEMORY, arguments)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        vcpu.kvm_run.close()
        for fd in (vcpu.stats.fd, vcpu.fd, vm.stats.fd, vm.fd):
            os.close(fd)
    return 0
