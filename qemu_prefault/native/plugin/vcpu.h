// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The hook around KVM_RUN. Each vCPU thread populates and prefaults just before it enters the
 * guest. During this work, the vCPU is not in KVM_RUN, and the thread does not hold the BQL. If
 * QEMU needs the vCPU, QEMU's kick (SIG_IPI) interrupts the work.
 */
#ifndef QEMU_PREFAULT_PLUGIN_VCPU_H
#define QEMU_PREFAULT_PLUGIN_VCPU_H

#include <stdbool.h>

#include "state.h"

#define SLICE MS(2) /* length of a slice after the guest has waited hold_ns */
#define SLICE_EVERY MS(10)

void pf_vcpu_created(int vcpu_fd, unsigned long id);
/* Do pending work, then issue KVM_RUN. */
long pf_vcpu_run(int vcpu_fd);

/* Return whether the vCPU can be used for the ioctl now. Call with pf_lock held. */
bool pf_vcpu_can_prefault(const struct vcpu *self);

#endif
