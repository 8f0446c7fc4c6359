// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How much memory the source behind a mapping can give, if that is less than the whole host: NUMA
 * nodes, their hugetlb pools, a file system. In bytes, or HEADROOM_UNLIMITED.
 *
 * host/memory_source.py answers the same for the agents that work from outside;
 * tests/unit/test_headroom_agreement.py holds both to one table.
 */
#ifndef QEMU_PREFAULT_MEMORY_SOURCE_H
#define QEMU_PREFAULT_MEMORY_SOURCE_H

#include <stdint.h>

#define SOURCE_NODES_MAX 1024 /* CONFIG_NODES_SHIFT is at most 10 */

struct source_nodes {
	uint64_t bits[16];
};

/* A list of the kernel's, such as "0-2,5"; returns 0 if the text is none. */
int32_t pf_source_parse_nodes(const char *text, struct source_nodes *nodes);

/*
 * The nodes that memory must come from: those with memory that the mapping's policy (`bound`) and
 * the cpuset (`allowed`) leave. Returns 0 if any node of the host will do.
 */
int32_t pf_source_confine(const struct source_nodes *with_memory, const struct source_nodes *bound,
			  const struct source_nodes *allowed, struct source_nodes *confined);

/* MemFree and Inactive(file) of these nodes; nodes_fd: /sys/devices/system/node. */
uint64_t pf_source_nodes(int32_t nodes_fd, const struct source_nodes *nodes);

/*
 * What the pool of huge pages of that size can give.
 *
 * pools_fd: /sys/kernel/mm/hugepages; nodes: those that the pages must come from, NULL for any;
 * ours: bytes that are reserved for the mapping that asks. Other reserved pages are promised.
 */
uint64_t pf_source_hugetlb(int32_t pools_fd, int32_t nodes_fd, const struct source_nodes *nodes,
			   uint64_t page_size, uint64_t ours);

/*
 * The free bytes of an open file's file system. `*others`: 0 if it has no more than `inodes`
 * inodes beside its root, so that nobody else was promised any of them.
 */
uint64_t pf_source_file_system(int32_t fd, uint64_t inodes, int32_t *others);

#endif
