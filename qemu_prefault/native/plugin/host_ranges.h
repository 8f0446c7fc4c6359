// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Facts about QEMU's memory: which ranges may be touched, and which ranges are already populated.
 *
 * The plugin learns these facts from QEMU's mmap(), madvise() and fallocate() calls, because no
 * other interface reports cheaply which anonymous mappings are overcommitted, and where virtio-mem
 * and the balloon have punched holes.
 *
 * The functions are thread-safe. While they hold their lock, they do not allocate, because an
 * allocator's mmap() may call them. Callers may hold pf_lock. Hold pf_lock if the facts must not
 * change between two calls.
 */
#ifndef QEMU_PREFAULT_PLUGIN_HOST_RANGES_H
#define QEMU_PREFAULT_PLUGIN_HOST_RANGES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Facts about a mapping. With populate=auto, the first three limit prefaults to resident pages. */
enum memory_fact {
	MEMORY_OVERCOMMIT = 1, /* MAP_NORESERVE: the guest may not need all pages */
	MEMORY_HOLES = 2,      /* partly discarded by virtio-mem or balloon */
	MEMORY_DISK_FILE = 4,  /* shared file on a disk: populating would write to it */
	MEMORY_HUGETLB = 8,    /* allocated from the hugetlb pool */
	MEMORY_PRIVATE = 16,   /* private mapping of a file */
	MEMORY_COPIED = 32,    /* private mapping of a file that may exist only in memory */
	MEMORY_STACKED = 64,   /* the file may be stored on another file system, such as a tmpfs */
};

/*
 * Open files that QEMU may be unable to open after it changes its root directory or user. May be
 * called again after a fork.
 */
void pf_ranges_open(void);
/* Close these files, if the plugin does not prefault. */
void pf_ranges_close(void);

/* Read /proc/self/smaps to learn the mappings that QEMU created before it loaded the plugin. */
void pf_ranges_learn(void);

/* Note that QEMU has mapped [start, start + size). fd < 0 means anonymous memory. */
void pf_ranges_mapped(uint64_t start, uint64_t size, int fd, int flags);
/* Note that QEMU has discarded [start, start + size). */
void pf_ranges_discarded(uint64_t start, uint64_t size);
/* Note that QEMU has punched a hole into a file. Returns false if the file is not mapped. */
bool pf_ranges_file_discarded(int fd);

/* Return the facts that hold for at least one part of [start, start + size). */
unsigned int pf_ranges_facts(uint64_t start, uint64_t size);
/* Return the huge page size in [start, start + size), or 0 if the range has no hugetlb memory. */
uint64_t pf_ranges_huge_page_size(uint64_t start, uint64_t size);

/*
 * Return QEMU's descriptor for the file that is mapped in [start, start + size), or -1 if no file
 * is mapped or the descriptor is unknown. QEMU owns the descriptor: do not close it.
 */
int pf_ranges_file(uint64_t start, uint64_t size, uint64_t *device, uint64_t *inode);
/*
 * Store the inodes of QEMU's mapped files on a device, up to `most` inodes. Returns their number.
 * Sets *deleted to the number of these files that have no directory entry.
 */
size_t pf_ranges_inodes(uint64_t device, uint64_t *inodes, size_t most, size_t *deleted);

/* Operations that the plugin has performed on a range at least once. */
enum memory_mark { MEMORY_POPULATED, MEMORY_PREFAULTED };
void pf_ranges_set_mark(enum memory_mark mark, uint64_t start, uint64_t size);
/* Find the first part of [start, start + size) without the mark. Returns false if none exists. */
bool pf_ranges_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
			uint64_t *length);

/* Return the number of present bytes in [start, start + size). */
uint64_t pf_ranges_present(uint64_t start, uint64_t size);
/* Find the next present, writable pages in [*start, end). Returns false if none exist. */
bool pf_ranges_next_resident(uint64_t *start, uint64_t end, uint64_t *length);

#endif
