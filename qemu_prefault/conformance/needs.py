# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions that check the requirements of cases.

Each function checks one requirement. If the host does not meet the requirement, the function
returns the reason. Otherwise it returns an empty string.
"""

from __future__ import annotations

import errno

from . import abi
from .host_facts import HostFacts


def nested_paging(host: HostFacts) -> str:
    return "" if host.paging != "shadow" else "this KVM uses shadow paging"


def shadow_paging(host: HostFacts) -> str:
    return "" if host.paging == "shadow" else f"this KVM uses {host.paging}"


def capability(host: HostFacts) -> str:
    return "" if host.capability else "this KVM does not offer the ioctl"


def known_ioctl(host: HostFacts) -> str:
    return "" if host.refusal != errno.EINVAL else "this kernel has no such ioctl"


def two_dimensional_mmu(host: HostFacts) -> str:
    return "" if host.tdp_mmu and not nested_paging(host) else "this KVM does not use the TDP MMU"


def legacy_mmu(host: HostFacts) -> str:
    if nested_paging(host):
        return nested_paging(host)
    return "this KVM uses the TDP MMU" if host.tdp_mmu else ""


def transparent_huge_pages(host: HostFacts) -> str:
    return "" if host.thp else "transparent_hugepage/enabled is never"


def hugetlb_2m(host: HostFacts) -> str:
    if host.hugepages[0] >= 4:
        return ""
    return "fewer than 4 free hugetlb pages of 2 MiB (set vm.nr_hugepages)"


def hugetlb_1g(host: HostFacts) -> str:
    if host.hugepages[1]:
        return ""
    return "no free hugetlb page of 1 GiB (boot with hugepagesz=1G hugepages=1)"


def ksm(host: HostFacts) -> str:
    return "" if host.ksm else "KSM is not running (set /sys/kernel/mm/ksm/run to 1)"


def root(host: HostFacts) -> str:
    return "" if host.root else "this case must run as root"


def slot_quirk(host: HostFacts) -> str:
    if host.quirks & abi.QUIRK_SLOT_ZAP_ALL:
        return ""
    return "this kernel has no KVM_X86_QUIRK_SLOT_ZAP_ALL"


def smm(host: HostFacts) -> str:
    return "" if host.smm else "this KVM has no system management mode"


def dirty_ring(host: HostFacts) -> str:
    return "" if host.dirty_ring else "this KVM has no dirty ring"


def software_protected(host: HostFacts) -> str:
    if host.vm_types >> abi.VM_SW_PROTECTED & 1:
        return ""
    return "this kernel has no KVM_X86_SW_PROTECTED_VM"


def mappable_guest_memfd(host: HostFacts) -> str:
    wanted = abi.GMEM_MMAP | abi.GMEM_INIT_SHARED
    return "" if host.gmem_flags & wanted == wanted else "this kernel cannot map a guest_memfd"


def nested_guests(host: HostFacts) -> str:
    return "" if host.nested else "the nested parameter of kvm_amd or kvm_intel is off"
