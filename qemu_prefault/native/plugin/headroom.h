// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory that the host and QEMU's cgroups still allow; see common/headroom.h. */
#ifndef QEMU_PREFAULT_PLUGIN_HEADROOM_H
#define QEMU_PREFAULT_PLUGIN_HEADROOM_H

#include <stdint.h>

/*
 * Open files that may be inaccessible later (chroot, another user). May be called again after a
 * fork.
 */
void pf_headroom_open(void);

/* Return the bytes still available, by MemAvailable and QEMU's cgroups. */
uint64_t pf_headroom(void);

/* Return the bytes still available in huge pages of that size, by pool and hugetlb cgroups. */
uint64_t pf_headroom_huge(uint64_t page_size);

#endif
