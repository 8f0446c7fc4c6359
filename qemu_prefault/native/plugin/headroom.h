// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory that QEMU can still allocate; see common/headroom.h. All sizes are in bytes. */
#ifndef QEMU_PREFAULT_PLUGIN_HEADROOM_H
#define QEMU_PREFAULT_PLUGIN_HEADROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/memory_source.h"

/*
 * Open files that QEMU may be unable to open after it changes its root directory or user. May be
 * called again after a fork.
 */
void pf_headroom_open(void);
/* Close these files, if the plugin does not prefault. */
void pf_headroom_close(void);

/* Return the bytes that MemAvailable and the limits of QEMU's cgroups still allow. */
uint64_t pf_headroom(void);

enum source_kind {
	SOURCE_HOST,
	SOURCE_COMMIT,
	SOURCE_NODES,
	SOURCE_POOL,
	SOURCE_FILE_SYSTEM,
	SOURCE_KINDS
};

/* A source of the memory that populating a range allocates. */
struct memory_source {
	enum source_kind kind;
	uint64_t page_size;  /* of huge pages, or 0 */
	bool reserved;	     /* absent huge pages are reserved for the range */
	bool confined;	     /* the memory must come from nodes */
	uint64_t cost;	     /* bytes allocated for each populated byte */
	uint64_t file_bytes; /* bytes of the mapped file that are allocated in addition, at most */
	struct source_nodes nodes;
	/* SOURCE_FILE_SYSTEM only: */
	uint64_t device, inode; /* of the file */
	int fd;			/* QEMU's descriptor for the file, owned by QEMU */
	bool copied;		/* QEMU copies the file's pages */
};

/*
 * Return whether the plugin can read all limits of a source: the limits of QEMU's cgroups, and the
 * bytes that other files in the source's file system can still allocate. If the plugin cannot read
 * a limit and populate=all is not set, pf_headroom_left() returns 0.
 */
bool pf_headroom_visible(const struct memory_source *source);

/*
 * Return the bytes of a source's file that have no block yet, or UINT64_MAX if the source has no
 * file.
 */
uint64_t pf_headroom_unallocated(const struct memory_source *source);
/* Store all sources of a range. Returns their number, which is SOURCE_KINDS at most. */
size_t pf_headroom_sources(uint64_t hva, uint64_t size, struct memory_source *sources);
/* Return whether two sources are the same. Each file is a separate source. */
bool pf_headroom_same(const struct memory_source *a, const struct memory_source *b);
/*
 * Return the free bytes of a source. ours is the number of bytes that are reserved for QEMU in a
 * pool. reserve is subtracted if the source may have other users, whose claims are unknown.
 */
uint64_t pf_headroom_left(const struct memory_source *source, uint64_t ours, uint64_t reserve);

#endif
