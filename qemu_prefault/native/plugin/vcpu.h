// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The hook around KVM_RUN: the vCPU threads do the work, each right before it enters the
 * guest. There its vCPU is out of KVM_RUN, the BQL is not held, and QEMU's own kick
 * (SIG_IPI) gets it out when somebody else needs the vCPU.
 */
#ifndef QEMU_PREFAULT_PLUGIN_VCPU_H
#define QEMU_PREFAULT_PLUGIN_VCPU_H

#include <stdbool.h>

#include "state.h"

#define SLICE MS(2) /* work at one go when the guest has waited long enough */
#define SLICE_EVERY MS(10)

void pf_vcpu_created(int vcpu_fd, unsigned long id);
/* KVM_RUN: work, and then the ioctl itself. */
long pf_vcpu_run(int vcpu_fd);

/* Whether its thread can do work now. The lock is held. */
bool pf_vcpu_can_prefault(const struct vcpu *self);

#endif
