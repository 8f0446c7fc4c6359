# SPDX-License-Identifier: GPL-2.0-or-later
"""Features of the CPU's nested paging that change the effects of the ioctl.

On AMD's CPUs, NPT always has accessed and dirty bits, and the CPU does not log dirty pages.
"""

from __future__ import annotations

from ..host.kvm import is_on, paging, parameter


def has_ad_bits() -> bool:
    """Return whether stage-2 entries have accessed and dirty bits.

    With ``kvm_intel.eptad=0``, they do not have these bits. The guest then exits at its first
    access to each prefaulted page (mmu/spte.c:mark_spte_for_access_track()).
    """
    found = paging()
    return found is None or found.ad_bits


def logs_dirty_pages() -> bool:
    """Return whether the CPU logs dirty pages (PML), so that KVM need not write-protect them."""
    found = paging()
    return found is not None and found.pml


def virtualizes_apic() -> bool:
    """Return whether KVM maps a page at the local APIC's address (APICv, AVIC).

    mmu/mmu.c:kvm_mmu_faultin_pfn() maps this page only if kvm_apicv_activated().
    """
    return is_on(parameter("kvm_intel", "enable_apicv")) or is_on(parameter("kvm_amd", "avic"))
