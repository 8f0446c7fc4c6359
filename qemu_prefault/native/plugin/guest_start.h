// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_GUEST_START_H
#define QEMU_PREFAULT_PLUGIN_GUEST_START_H

/*
 * Prepare the queue before the guest's first instruction, when all memslots exist and no vCPU
 * runs. Call with pf_lock held.
 */
void pf_guest_start(void);

#endif
