/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the plugin knows of QEMU's own memory: which of it may be touched, what was
 * populated already, and whether the host can afford more.
 *
 * Learnt from QEMU's own mmap(), madvise() and fallocate(), because nothing else tells
 * at no cost: an anonymous mapping's overcommit, and the holes that virtio-mem and the
 * balloon punch. Not thread safe: the keeper's lock is held around every call.
 */
#ifndef QEMU_PREFAULT_HOST_MEMORY_H
#define QEMU_PREFAULT_HOST_MEMORY_H

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
void memory_open(void);

/* Learn from /proc/self/smaps what was mapped before we were told. */
void memory_learn(void);

/* QEMU mapped [start, start + size): whatever was known of it is void. fd < 0: anonymous. */
void memory_mapped(uint64_t start, uint64_t size, int fd, int flags);
/* QEMU discarded [start, start + size). */
void memory_discarded(uint64_t start, uint64_t size);
/* QEMU punched a hole into a file; false: none of its mappings is known. */
bool memory_file_discarded(int fd);

/* Facts that hold for any part of [start, start + size). */
unsigned int memory_facts(uint64_t start, uint64_t size);

/* What was done to a range of it at least once. */
enum memory_mark { MEMORY_POPULATED, MEMORY_PREFAULTED };
void memory_set_mark(enum memory_mark mark, uint64_t start, uint64_t size);
/* The first part of [start, start + size) that has no such mark; false: all of it has. */
bool memory_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
		     uint64_t *length);

/* Bytes of [start, start + size) that are present. */
uint64_t memory_present(uint64_t start, uint64_t size);
/* The next run of present, writable pages from *start on, below end; false: none. */
bool memory_next_resident(uint64_t *start, uint64_t end, uint64_t *length);

/* Bytes the host can give: MemAvailable, and what QEMU's cgroups leave. */
uint64_t memory_headroom(void);

#endif
