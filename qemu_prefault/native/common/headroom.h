// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Compute from /proc, sysfs and cgroup files how much more memory a process may allocate. All
 * results are in bytes. HEADROOM_UNLIMITED means that no limit is set, or that the process could
 * not read any limit.
 *
 * host/headroom.py is the Python implementation, for use outside QEMU.
 * tests/unit/test_headroom_agreement.py checks that both implementations return the same results.
 */
#ifndef QEMU_PREFAULT_HEADROOM_H
#define QEMU_PREFAULT_HEADROOM_H

#include <stdint.h>

#define HEADROOM_UNLIMITED UINT64_MAX

/* The directory of a process's cgroup. Its path contains the paths of the cgroup's ancestors. */
struct headroom_group {
	char directory[4096];
	uint32_t root_length; /* length of the mount point at the start of directory */
	int32_t unified;      /* 1: cgroup v2; 0: v1 */
};

/* Return MemAvailable, read from a descriptor for /proc/meminfo. */
uint64_t pf_headroom_host(int32_t meminfo_fd);
/*
 * Return the bytes that may still be committed, if vm.overcommit_memory is 2. The arguments are
 * descriptors for /proc/sys/vm/overcommit_memory and /proc/meminfo.
 */
uint64_t pf_headroom_commit(int32_t overcommit_fd, int32_t meminfo_fd);

/*
 * Find a process's cgroup. cgroup_file is the path of the process's /proc/PID/cgroup, and
 * mountinfo_file is the path of /proc/self/mountinfo. The controller is "memory" or "hugetlb".
 * Returns 1, or 0 if the cgroup is not below any mount point.
 */
int pf_headroom_find_group(const char *cgroup_file, const char *mountinfo_file,
			   const char *controller, struct headroom_group *group);
/*
 * Return 1 if pf_headroom_find_group() can find the limits of the process's cgroup and of all its
 * ancestors, or if these limits do not exist. The arguments are those of
 * pf_headroom_find_group(). namespace_link is the path of the process's /proc/PID/ns/cgroup. In a
 * cgroup namespace, the ancestors are not visible, so the function returns 0.
 */
int pf_headroom_sees_group(const char *cgroup_file, const char *mountinfo_file,
			   const char *namespace_link, const char *controller);
/* Change group to its parent. Returns 0 if group is the root of its hierarchy. */
int pf_headroom_parent(struct headroom_group *group);

/*
 * Open the directory of a memory cgroup. Returns a descriptor, or -1 if the cgroup has no limit
 * files. A limit that is set later counts as well.
 */
int pf_headroom_open_group(const struct headroom_group *group);
/*
 * Return the number of bytes that a memory cgroup still allows, but at most `least`. Inactive page
 * cache counts as available. If a file of the cgroup cannot be opened any more, the result is 0.
 */
uint64_t pf_headroom_group(int32_t directory_fd, int32_t unified, uint64_t least);

/* Return the bytes that a hugetlb cgroup still allows. directory_fd is the cgroup's directory. */
uint64_t pf_headroom_hugetlb_group(int32_t directory_fd, int32_t unified, uint64_t page_size);
/*
 * Return the free bytes of the hugetlb pool with this page size, or 0 if the pool does not exist.
 * Pages that the kernel may still add by overcommit count as free if they fit into the available
 * bytes of the host, from which the kernel allocates them. directory_fd is a descriptor for
 * /sys/kernel/mm/hugepages.
 */
uint64_t pf_headroom_hugetlb_pool(int32_t directory_fd, uint64_t page_size, uint64_t host);

#endif
