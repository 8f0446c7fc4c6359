// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How much more memory a process may take, by the files in which the kernel tells: bytes, or
 * HEADROOM_UNLIMITED where there is no limit or none can be read.
 *
 * Process.memory_headroom() and hugetlb_free() answer the same for the agents that work from
 * outside; tests/unit/test_headroom_agreement.py holds both to one table.
 */
#ifndef QEMU_PREFAULT_HEADROOM_H
#define QEMU_PREFAULT_HEADROOM_H

#include <stdint.h>

#define HEADROOM_UNLIMITED UINT64_MAX

/* The directory of a process's own cgroup; its ancestors' are the beginnings of that path. */
struct headroom_group {
	char directory[4096];
	uint32_t root_length; /* the path's length down to where the hierarchy is mounted */
	int32_t unified;      /* of the v2 hierarchy */
};

/* A memory cgroup's files, held open; -1: there is none. */
struct headroom_files {
	int32_t max, high, usage, stat;
	int32_t unified;
};

/* MemAvailable, by a descriptor of /proc/meminfo. */
uint64_t pf_headroom_host(int32_t meminfo_fd);

/*
 * Find a process's cgroup by the text of its /proc/PID/cgroup and our /proc/self/mountinfo, both
 * given as paths of files. The controller is "memory" or "hugetlb". Returns 0 if it is not seen.
 */
int pf_headroom_find_group(const char *cgroup_file, const char *mountinfo_file,
			   const char *controller, struct headroom_group *group);
/* Go on to the parent; 0: that was the root. */
int pf_headroom_parent(struct headroom_group *group);

void pf_headroom_open_group(const struct headroom_group *group, struct headroom_files *files);
void pf_headroom_close_group(struct headroom_files *files);
/* What a memory cgroup leaves, inactive page cache counted as available; at most `least`. */
uint64_t pf_headroom_group(const struct headroom_files *files, uint64_t least);

/* The same of a hugetlb cgroup, by a descriptor of its directory. */
uint64_t pf_headroom_hugetlb_group(int32_t directory_fd, int32_t unified, uint64_t page_size);
/* What a pool has, by a descriptor of /sys/kernel/mm/hugepages; 0 without such a pool. */
uint64_t pf_headroom_hugetlb_pool(int32_t directory_fd, uint64_t page_size);

#endif
