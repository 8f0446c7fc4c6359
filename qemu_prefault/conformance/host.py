# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host can do, as far as cases need to know it. Asked, never concluded."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from .._native import lib
from ..errors import Code, UnsupportedError
from ..host.kvm import KVM_CAP_PRE_FAULT_MEMORY, parameter
from ..units import PAGE_SIZE
from . import abi, vmm


@dataclass(frozen=True)
class Host:
    """This kernel, its KVM and how they are set.

    :ivar capability: KVM_CAP_PRE_FAULT_MEMORY.
    :ivar refusal: the errno of a prefault that is right in all else; 0 where it works.
    :ivar paging: ``NPT``, ``EPT``, or ``shadow``.
    :ivar tdp_mmu: the TDP MMU is in use (``kvm.tdp_mmu``).
    :ivar ad_bits: entries have accessed and dirty bits (not so with ``kvm_intel.eptad=0``).
    :ivar thp: transparent huge pages are to be had.
    :ivar hugepages: free 2 MiB and 1 GiB pages of hugetlb.
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
    nested_svm: bool
    thp: bool
    hugepages: tuple[int, int]
    ksm: bool
    root: bool

    @property
    def mode(self) -> str:
        """The name of the paging mode, as kvm's parameters set it."""
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


def _on(value: str | None) -> bool:
    return value in ("Y", "1", "y")


def look() -> Host:
    """Ask the kernel.

    :raise UnsupportedError: there is no KVM, or it is not ours to use.
    """
    try:
        kvm = vmm.kvm()
    except OSError as error:
        raise UnsupportedError(
            f"/dev/kvm cannot be opened: {error.strerror}",
            "no KVM: load kvm_amd or kvm_intel, or enable virtualization in the firmware; "
            "no permission: run as root, or in group kvm",
            code=Code.NO_KVM,
        ) from error

    def check(capability: int) -> int:
        return max(0, int(lib.pf_vmm_ioctl(kvm, abi.CHECK_EXTENSION, capability)))

    capability = check(KVM_CAP_PRE_FAULT_MEMORY) > 0
    amd = _on(parameter("kvm_amd", "npt"))
    return Host(
        kernel=os.uname().release,
        capability=capability,
        refusal=_refusal(),
        paging="NPT" if amd else "EPT" if _on(parameter("kvm_intel", "ept")) else "shadow",
        tdp_mmu=_on(parameter("kvm", "tdp_mmu")),
        ad_bits=parameter("kvm_intel", "eptad") not in ("N", "0"),
        vm_types=check(abi.CAP_VM_TYPES),
        quirks=check(abi.CAP_DISABLE_QUIRKS2),
        smm=check(abi.CAP_X86_SMM) > 0,
        dirty_ring=check(abi.CAP_DIRTY_LOG_RING) > 0,
        gmem_flags=check(abi.CAP_GUEST_MEMFD_FLAGS),
        nested_svm=_on(parameter("kvm_amd", "nested")),
        thp="[never]" not in _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        hugepages=(_free(2048), _free(1048576)),
        ksm=_text("/sys/kernel/mm/ksm/run") == "1",
        root=os.geteuid() == 0,
    )


def _refusal() -> int:
    """What a well-formed prefault of a page that is there comes to."""
    vm = vmm.Vm()
    vcpu = vm.vcpu()
    arguments = bytearray(struct.pack("<8Q", 0, PAGE_SIZE, *[0] * 6))
    try:
        vmm.ioctl(vcpu.fd, abi.PRE_FAULT_MEMORY, arguments)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        vcpu.kvm_run.close()
        for fd in (vcpu.stats.fd, vcpu.fd, vm.stats.fd, vm.fd):
            os.close(fd)
    return 0


# What cases need.


def nested_paging(host: Host) -> str:
    return "" if host.paging != "shadow" else "this KVM uses shadow paging"


def shadow_paging(host: Host) -> str:
    return "" if host.paging == "shadow" else f"this KVM uses {host.paging}"


def capability(host: Host) -> str:
    return "" if host.capability else "this KVM does not offer the ioctl"


def known_ioctl(host: Host) -> str:
    return "" if host.refusal != errno.EINVAL else "this kernel has no such ioctl"


def two_dimensional_mmu(host: Host) -> str:
    return "" if host.tdp_mmu and not nested_paging(host) else "not the TDP MMU"


def legacy_mmu(host: Host) -> str:
    if nested_paging(host):
        return nested_paging(host)
    return "this KVM uses the TDP MMU" if host.tdp_mmu else ""


def transparent_huge_pages(host: Host) -> str:
    return "" if host.thp else "transparent_hugepage/enabled is never"


def hugetlb_2m(host: Host) -> str:
    if host.hugepages[0] >= 4:
        return ""
    return "fewer than 4 free hugetlb pages of 2 MiB (set vm.nr_hugepages)"


def hugetlb_1g(host: Host) -> str:
    return "" if host.hugepages[1] else "no free hugetlb page of 1 GiB"


def ksm(host: Host) -> str:
    return "" if host.ksm else "KSM does not run (/sys/kernel/mm/ksm/run)"


def root(host: Host) -> str:
    return "" if host.root else "needs root"


def slot_quirk(host: Host) -> str:
    if host.quirks & abi.QUIRK_SLOT_ZAP_ALL:
        return ""
    return "this kernel has no KVM_X86_QUIRK_SLOT_ZAP_ALL"


def smm(host: Host) -> str:
    return "" if host.smm else "this KVM has no system management mode"


def dirty_ring(host: Host) -> str:
    return "" if host.dirty_ring else "this KVM has no dirty ring"


def software_protected(host: Host) -> str:
    if host.vm_types >> abi.VM_SW_PROTECTED & 1:
        return ""
    return "this kernel has no KVM_X86_SW_PROTECTED_VM"


def mappable_guest_memfd(host: Host) -> str:
    wanted = abi.GMEM_MMAP | abi.GMEM_INIT_SHARED
    return "" if host.gmem_flags & wanted == wanted else "guest_memfd cannot be mapped here"


def nested_svm(host: Host) -> str:
    return "" if host.nested_svm else "kvm_amd.nested is off, or this is not AMD"
