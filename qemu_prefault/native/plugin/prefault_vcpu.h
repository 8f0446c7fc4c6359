// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Prefault vCPUs: KVM vCPUs that the plugin creates and that never enter the guest.
 *
 * KVM shares one page-table root among all vCPUs with the same role (kvm_tdp_mmu_alloc_root(),
 * arch/x86/kvm/mmu/tdp_mmu.c). Therefore the prefault ioctl on a prefault vCPU fills the guest's
 * tables while the guest runs, also while all of its vCPUs are in guest mode. A second prefault
 * vCPU, which is in SMM, fills the tables that firmware uses in SMM.
 */
#ifndef QEMU_PREFAULT_PLUGIN_PREFAULT_VCPU_H
#define QEMU_PREFAULT_PLUGIN_PREFAULT_VCPU_H

#include <linux/kvm.h>
#include <stdbool.h>

#include "state.h"

/*
 * Issue KVM_ENABLE_CAP for QEMU. If QEMU limits its vCPU ids, add the ids of the prefault vCPUs,
 * which QEMU can then never use.
 */
long pf_prefault_vcpus_enable_cap(int vm_fd, struct kvm_enable_cap *cap);

/* Note that QEMU has asked KVM to encrypt the guest's memory or state. */
void pf_prefault_vcpus_encrypted(void);

/*
 * Repeat the settings of QEMU's vCPUs on the prefault vCPUs. Without the writes of the TSC, the
 * guest would lose its master clock, because KVM wants the TSCs of all vCPUs to match
 * (pvclock_update_vm_gtod_copy(), arch/x86/kvm/x86.c).
 */
void pf_prefault_vcpus_set_cpuid(int vcpu_fd, const struct kvm_cpuid2 *cpuid);
void pf_prefault_vcpus_set_msrs(const struct kvm_msrs *msrs, long count);
void pf_prefault_vcpus_set_tsc_khz(unsigned long khz);

/* Create the prefault vCPUs if possible. Call once, with pf_lock held, before the first KVM_RUN. */
void pf_prefault_vcpus_create(void);

/* Return the prefault vCPU for an address space (0, or 1 for SMM), or NULL if it does not exist. */
struct vcpu *pf_prefault_vcpu(unsigned int address_space);

/*
 * Create no prefault vCPUs. `why` is a clause whose subject is the plugin. The function prints a line
 * to stderr. It does not allocate.
 */
void pf_prefault_vcpus_refuse(const char *why);

/* Return why the plugin has not created a prefault vCPU, or NULL if it has created one. */
const char *pf_prefault_vcpus_missing(void);

/* Return whether start=background and rate=BYTES have no effect because of this. */
void pf_prefault_vcpus_ignored_options(bool *start, bool *rate);

/*
 * Give the vCPU a new root if KVM has dropped its root since the last call, or if `always` is set.
 * Before commit 20a6cff3b283 (v6.15), the prefault ioctl never ends on an obsolete root. Call with
 * pf_lock held, while no slot change and no prefault ioctl is in progress on the vCPU.
 */
void pf_prefault_vcpu_renew_root(struct vcpu *vcpu, bool always);

#endif
