// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PAGEMAP_H
#define QEMU_PREFAULT_PAGEMAP_H

#include <stddef.h>
#include <stdint.h>

struct pagemap_region {
	uint64_t start, size; /* bytes; host virtual addresses */
};

/*
 * Pages of [start, end) that a read fault of KVM maps writable: present, not the
 * zero page, and in a private mapping not still the file's page. Fills regions[]
 * with at most count regions in ascending order and sets *next to where the scan
 * stopped (end when it is complete). Returns the number of regions, or -errno.
 *
 * PAGEMAP_SCAN (Linux 6.7) where it exists; else /proc/PID/pagemap entries, which
 * cannot tell the zero page from others.
 */
long pf_pagemap_writable(int32_t fd, uint64_t start, uint64_t end, int32_t is_private,
			 struct pagemap_region *regions, size_t count, uint64_t *next);

/*
 * Sums over [start, end), in bytes. *present: mapped in the process at all;
 * *writable: as above. Returns 0 or -errno.
 */
long pf_pagemap_sum(int32_t fd, uint64_t start, uint64_t end, int32_t is_private, uint64_t *present,
		    uint64_t *writable);

#endif
