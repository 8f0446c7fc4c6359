// SPDX-License-Identifier: GPL-2.0-or-later
/* The memslots of QEMU's VM, as its own ioctls make and change them. */
#ifndef QEMU_PREFAULT_PLUGIN_MEMSLOTS_H
#define QEMU_PREFAULT_PLUGIN_MEMSLOTS_H

/* KVM_SET_USER_MEMORY_REGION{,2}: the ioctl itself, and what follows from it. */
long pf_memslots_change(int vm_fd, unsigned long request, void *region);

#endif
