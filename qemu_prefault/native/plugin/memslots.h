// SPDX-License-Identifier: GPL-2.0-or-later
/* The memslots of QEMU's VM, as QEMU's ioctls define them. */
#ifndef QEMU_PREFAULT_PLUGIN_MEMSLOTS_H
#define QEMU_PREFAULT_PLUGIN_MEMSLOTS_H

/* Issue KVM_SET_USER_MEMORY_REGION{,2} for QEMU and update the memslots and the queue. */
long pf_memslots_change(int vm_fd, unsigned long request, void *region);

/* Decide again which memslots to prefault. Call with pf_lock held. */
void pf_memslots_classify_again(void);

#endif
