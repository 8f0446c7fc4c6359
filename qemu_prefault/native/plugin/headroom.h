// SPDX-License-Identifier: GPL-2.0-or-later
/* How much more memory the host and QEMU's cgroups can give; see common/headroom.h. */
#ifndef QEMU_PREFAULT_PLUGIN_HEADROOM_H
#define QEMU_PREFAULT_PLUGIN_HEADROOM_H

#include <stdint.h>

/* Opens what may be out of reach later (chroot, another user). Safe to call again after fork. */
void pf_headroom_open(void);

/* Bytes the host can give: MemAvailable, and what QEMU's cgroups leave. */
uint64_t pf_headroom(void);

/* Bytes in huge pages of that size: the pool, and what QEMU's hugetlb cgroups leave. */
uint64_t pf_headroom_huge(uint64_t page_size);

#endif
