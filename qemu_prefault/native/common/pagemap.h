// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PAGEMAP_H
#define QEMU_PREFAULT_PAGEMAP_H

#include <stddef.h>
#include <stdint.h>

struct pagemap_region {
	uint64_t start, size; /* bytes; host virtual addresses */
};

/*
 * Find the pages in [start, end) that a KVM read fault maps writable. Such a page is present and is
 * not the zero page. In a private mapping, it is also not in the file's page cache.
 *
 * Fills regions[] with at most count regions in ascending order. Sets *next to the address at which
 * the scan stopped, which is end if the scan is complete. Returns the number of regions, or -errno.
 *
 * If the kernel lacks PAGEMAP_SCAN (added in Linux 6.7), the function reads /proc/PID/pagemap
 * entries, which do not distinguish the zero page from other pages.
 */
long pf_pagemap_writable(int32_t fd, uint64_t start, uint64_t end, int32_t is_private,
			 struct pagemap_region *regions, size_t count, uint64_t *next);

/*
 * Count the bytes in [start, end). Sets *present to the bytes that are mapped in the process, and
 * *writable to the bytes that pf_pagemap_writable() finds. Returns 0 or -errno.
 */
long pf_pagemap_sum(int32_t fd, uint64_t start, uint64_t end, int32_t is_private, uint64_t *present,
		    uint64_t *writable);

#endif
