// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory that the host and QEMU's cgroups still allow; see common/headroom.h. */
#ifndef QEMU_PREFAULT_PLUGIN_HEADROOM_H
#define QEMU_PREFAULT_PLUGIN_HEADROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/memory_source.h"

/*
 * Open files that may be inaccessible later (chroot, another user). May be called again after a
 * fork.
 */
void pf_headroom_open(void);

/* Return the bytes still available, by MemAvailable and QEMU's cgroups. */
uint64_t pf_headroom(void);

enum source_kind { SOURCE_HOST, SOURCE_NODES, SOURCE_POOL, SOURCE_FILE_SYSTEM, SOURCE_KINDS };

/* A source of the memory that populating a range allocates. */
struct memory_source {
	enum source_kind kind;
	uint64_t page_size; /* of huge pages, or 0 */
	bool reserved;	    /* absent huge pages are reserved for the range */
	bool confined;	    /* the memory must come from nodes */
	struct source_nodes nodes;
	/* SOURCE_FILE_SYSTEM only: */
	uint64_t device, inode; /* of the file */
	uint64_t inodes;	/* files that QEMU has mapped in the file system */
	int fd;			/* QEMU's descriptor of the file; not owned by us */
};

/* Return the bytes of its file that have no block yet, or UINT64_MAX for other sources. */
uint64_t pf_headroom_unallocated(const struct memory_source *source);
/* Store all sources of a range. Returns their number, which is SOURCE_KINDS at most. */
size_t pf_headroom_sources(uint64_t hva, uint64_t size, struct memory_source *sources);
/* Return whether two sources are the same. Each file is a source of its own. */
bool pf_headroom_same(const struct memory_source *a, const struct memory_source *b);
/*
 * Return the bytes that a source still has. ours is the number of bytes that are reserved for us in
 * a pool. reserve is subtracted if other users of the source have claims that we cannot see.
 */
uint64_t pf_headroom_left(const struct memory_source *source, uint64_t ours, uint64_t reserve);

#endif
