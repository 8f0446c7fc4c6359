// SPDX-License-Identifier: GPL-2.0-or-later
/* How much more memory the host and QEMU's cgroups can give; see common/headroom.h. */
#ifndef QEMU_PREFAULT_PLUGIN_HEADROOM_H
#define QEMU_PREFAULT_PLUGIN_HEADROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/memory_source.h"

/* Opens what may be out of reach later (chroot, another user). Safe to call again after fork. */
void pf_headroom_open(void);

/* Bytes the host can give: MemAvailable, and what QEMU's cgroups leave. */
uint64_t pf_headroom(void);

enum source_kind { SOURCE_HOST, SOURCE_NODES, SOURCE_POOL, SOURCE_FILE_SYSTEM, SOURCE_KINDS };

/* One thing that populating a range takes from. */
struct memory_source {
	enum source_kind kind;
	uint64_t page_size; /* of the pool */
	bool reserved;	    /* absent huge pages are reserved for the range */
	bool confined;	    /* to these nodes: */
	struct source_nodes nodes;
	uint64_t device, inode; /* of the file */
	uint64_t inodes;	/* files of QEMU's in its file system */
	int fd;			/* of the file */
};

/* Bytes of its file that have no block yet; UINT64_MAX: it is no file. */
uint64_t pf_headroom_unallocated(const struct memory_source *source);
/* All that populating the range takes from; returns how many, at most SOURCE_KINDS. */
size_t pf_headroom_sources(uint64_t hva, uint64_t size, struct memory_source *sources);
bool pf_headroom_same(const struct memory_source *a, const struct memory_source *b);
/*
 * Bytes it can give. ours: those that are reserved for us in a pool. reserve: bytes that are left
 * to others, where what they were promised cannot be seen.
 */
uint64_t pf_headroom_left(const struct memory_source *source, uint64_t ours, uint64_t reserve);

#endif
