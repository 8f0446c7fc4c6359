// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The free memory of NUMA nodes, hugetlb pools and file systems. All sizes are in bytes.
 * HEADROOM_UNLIMITED means that the source has no limit.
 *
 * host/memory_source.py is the Python implementation, for agents outside QEMU.
 * tests/unit/test_headroom_agreement.py checks that both implementations return the same results.
 */
#ifndef QEMU_PREFAULT_MEMORY_SOURCE_H
#define QEMU_PREFAULT_MEMORY_SOURCE_H

#include <stdint.h>

#define SOURCE_NODES_MAX 1024 /* CONFIG_NODES_SHIFT is 10 at most (arch/x86/Kconfig) */

struct source_nodes {
	uint64_t bits[16];
};

/* Parse a list of node numbers in the kernel's format, such as "0-2,5". Returns 0 on error. */
int32_t pf_source_parse_nodes(const char *text, struct source_nodes *nodes);

/*
 * Compute the nodes that memory must come from. These are the nodes in `with_memory` that the
 * mapping's policy (`bound`) and the cpuset (`allowed`) allow. Returns 0 if the policy and the
 * cpuset allow all nodes in `with_memory`.
 */
int32_t pf_source_confine(const struct source_nodes *with_memory, const struct source_nodes *bound,
			  const struct source_nodes *allowed, struct source_nodes *confined);

/* Return MemFree plus Inactive(file) of the nodes. nodes_fd refers to /sys/devices/system/node. */
uint64_t pf_source_nodes(int32_t nodes_fd, const struct source_nodes *nodes);

/*
 * Return the bytes in free huge pages of this size that the kernel has not reserved for other
 * mappings.
 *
 * pools_fd refers to /sys/kernel/mm/hugepages. nodes are the nodes that the pages must come from;
 * NULL means any node. ours is the number of bytes that are reserved for the caller's mappings. host
 * is the number of bytes that the host has available for additional huge pages.
 */
uint64_t pf_source_hugetlb(int32_t pools_fd, int32_t nodes_fd, const struct source_nodes *nodes,
			   uint64_t page_size, uint64_t ours, uint64_t host);

/*
 * Return whether a file system may store its files on another file system, which may be a tmpfs.
 * This applies to an overlay, for example, and to each unknown type without a block device.
 *
 * type is the type that statfs() reports, and not that of tmpfs, ramfs or hugetlbfs. The function
 * returns 0 for FUSE, because a request to a FUSE server could block the guest.
 */
int32_t pf_source_is_stacked(uint64_t type, uint64_t device);

/*
 * Return the free bytes of an open file's file system. Sets *inodes to the number of used inodes,
 * or to 0 if this number is unknown.
 */
uint64_t pf_source_file_system(int32_t fd, uint64_t *inodes);

/*
 * Return the bytes that files in an open file's file system can still allocate without ftruncate().
 * This is the sum of each file's size minus its allocated blocks, without the files whose inodes
 * are in `ours`. Returns HEADROOM_UNLIMITED if the function cannot count every file exactly. Sets
 * *inodes to the number of inodes found, including the root directory.
 */
uint64_t pf_source_committed(int32_t fd, const uint64_t *ours, uint32_t count, uint64_t *inodes);

#endif
