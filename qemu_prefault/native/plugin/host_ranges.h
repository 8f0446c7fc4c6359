// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the plugin knows of QEMU's own memory: which of it may be touched, and what was
 * populated already.
 *
 * Learnt from QEMU's own mmap(), madvise() and fallocate(), because nothing else tells
 * at no cost: an anonymous mapping's overcommit, and the holes that virtio-mem and the
 * balloon punch. Thread safe, by a lock of its own under which nothing is allocated: an
 * allocator's own mmap() takes it. pf_lock may be held, and is where two calls belong together.
 */
#ifndef QEMU_PREFAULT_PLUGIN_HOST_RANGES_H
#define QEMU_PREFAULT_PLUGIN_HOST_RANGES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Why a mapping is only prefaulted where it is resident. */
enum memory_fact {
	MEMORY_OVERCOMMIT = 1, /* MAP_NORESERVE: absent on purpose */
	MEMORY_HOLES = 2,      /* discarded in parts: virtio-mem, balloon */
	MEMORY_DISK_FILE = 4,  /* shared file on a disk: touching it would write it */
	MEMORY_HUGETLB = 8,    /* has a pool of its own; may be touched */
	MEMORY_PRIVATE = 16,   /* MAP_PRIVATE of a file */
};

/* Opens what may be out of reach later (chroot, another user). Safe to call again after fork. */
void pf_ranges_open(void);

/* Learn from /proc/self/smaps what was mapped before we were told. */
void pf_ranges_learn(void);

/* QEMU mapped [start, start + size): whatever was known of it is void. fd < 0: anonymous. */
void pf_ranges_mapped(uint64_t start, uint64_t size, int fd, int flags);
/* QEMU discarded [start, start + size). */
void pf_ranges_discarded(uint64_t start, uint64_t size);
/* QEMU punched a hole into a file; false: none of its mappings is known. */
bool pf_ranges_file_discarded(int fd);

/* Facts that hold for any part of [start, start + size). */
unsigned int pf_ranges_facts(uint64_t start, uint64_t size);
/* Of the MEMORY_HUGETLB in [start, start + size); 0: there is none. */
uint64_t pf_ranges_huge_page_size(uint64_t start, uint64_t size);

/*
 * QEMU's descriptor of the file that is mapped there; -1: none, or not known. *inodes: how many
 * files of that device QEMU has mapped.
 */
int pf_ranges_file(uint64_t start, uint64_t size, uint64_t *device, uint64_t *inode,
		   uint64_t *inodes);

/* What was done to a range of it at least once. */
enum memory_mark { MEMORY_POPULATED, MEMORY_PREFAULTED };
void pf_ranges_set_mark(enum memory_mark mark, uint64_t start, uint64_t size);
/* The first part of [start, start + size) that has no such mark; false: all of it has. */
bool pf_ranges_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
			uint64_t *length);

/* Bytes of [start, start + size) that are present. */
uint64_t pf_ranges_present(uint64_t start, uint64_t size);
/* The next run of present, writable pages from *start on, below end; false: none. */
bool pf_ranges_next_resident(uint64_t *start, uint64_t end, uint64_t *length);

#endif
