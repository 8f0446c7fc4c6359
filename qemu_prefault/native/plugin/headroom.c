// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "headroom.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/headroom.h"
#include "host_ranges.h"
#include "options.h"

enum { CGROUP_LEVELS = 16, FILES_MAX = 64 };

static int meminfo_fd = -1, overcommit_fd = -1, pools_fd = -1, nodes_fd = -1, min_free_fd = -1;
static struct source_nodes nodes_with_memory;
static bool several_nodes;
/* The directories of QEMU's cgroup and its ancestors: one descriptor for each level. */
struct group {
	int directory;
	int unified;
};
static struct group memory_groups[CGROUP_LEVELS], hugetlb_groups[CGROUP_LEVELS];
static int memory_group_count, hugetlb_group_count;
static bool sees_memory_groups = true, sees_hugetlb_groups = true;

uint64_t pf_headroom(void)
{
	uint64_t least = pf_headroom_host(meminfo_fd);

	for (int i = 0; i < memory_group_count; i++)
		least = pf_headroom_group(memory_groups[i].directory, memory_groups[i].unified,
					  least);
	return least;
}

static uint64_t hugetlb_left(const struct memory_source *source, uint64_t ours)
{
	const struct source_nodes *nodes = source->confined ? &source->nodes : NULL;
	uint64_t page_size = source->page_size, least = HEADROOM_UNLIMITED;

	/* The kernel guarantees a reserved page, but not its node. */
	if (pools_fd >= 0 && (nodes || !source->reserved))
		least = pf_source_hugetlb(pools_fd, nodes_fd, nodes, page_size, ours,
					  pf_headroom_host(meminfo_fd));
	for (int i = 0; i < hugetlb_group_count; i++) {
		uint64_t left = pf_headroom_hugetlb_group(hugetlb_groups[i].directory,
							  hugetlb_groups[i].unified, page_size);

		least = left < least ? left : least;
	}
	return least;
}

/* --- sources of a range --- */

/* Return the nodes that get_mempolicy() reports, or no nodes if it fails. */
static struct source_nodes policy_nodes(void *address, unsigned long flags, int *mode)
{
	struct source_nodes nodes = { 0 };

	*mode = MPOL_DEFAULT;
	if (syscall(SYS_get_mempolicy, mode, nodes.bits, SOURCE_NODES_MAX + 1, address, flags))
		memset(&nodes, 0, sizeof(nodes));
	return nodes;
}

/*
 * Return the nodes to which the memory's policy binds the memory. If the memory has no policy of
 * its own, use this thread's policy. If the policy is not MPOL_BIND, the result is empty.
 */
static struct source_nodes bound_nodes(uint64_t hva)
{
	const struct source_nodes none = { 0 };
	int mode;
	struct source_nodes nodes = policy_nodes((void *)hva, MPOL_F_ADDR, &mode);

	if (mode == MPOL_DEFAULT)
		nodes = policy_nodes(NULL, 0, &mode);
	return (mode & ~MPOL_MODE_FLAGS) == MPOL_BIND ? nodes : none;
}

static bool confining_nodes(uint64_t hva, struct source_nodes *nodes)
{
	struct source_nodes bound, allowed;
	int mode;

	if (!several_nodes)
		return false;
	bound = bound_nodes(hva);
	allowed = policy_nodes(NULL, MPOL_F_MEMS_ALLOWED, &mode);
	return pf_source_confine(&nodes_with_memory, &bound, &allowed, nodes);
}

size_t pf_headroom_sources(uint64_t hva, uint64_t size, struct memory_source *sources)
{
	unsigned int facts = pf_ranges_facts(hva, size);
	struct memory_source source = { .reserved = !(facts & MEMORY_OVERCOMMIT), .cost = 1 };
	struct memory_source file = { .kind = SOURCE_FILE_SYSTEM, .cost = 1 };
	size_t count = 0;
	bool allocates_file = !(facts & MEMORY_PRIVATE);
	uint64_t unallocated;

	source.confined = confining_nodes(hva, &source.nodes);
	source.page_size = pf_ranges_huge_page_size(hva, size);
	source.kind = source.page_size ? SOURCE_POOL : SOURCE_HOST;
	file.fd = pf_ranges_file(hva, size, &file.device, &file.inode);
	/* The fault allocates the file's page and its copy (mm/shmem.c, shmem_fault()). */
	unallocated = facts & MEMORY_COPIED ? pf_headroom_unallocated(&file) : 0;
	if (unallocated) {
		allocates_file = true;
		file.copied = file.fd >= 0;
		if (file.copied)
			source.file_bytes = unallocated;
		else /* the file is unknown */
			source.cost = 2;
	}
	sources[count++] = source;
	if (source.confined && !source.page_size) {
		source.kind = SOURCE_NODES;
		sources[count++] = source;
	}
	/*
	 * The size of a hugetlbfs mount also limits private mappings (subpools in mm/hugetlb.c).
	 * The kernel counts reserved huge pages as used.
	 */
	if (source.page_size)
		allocates_file = !source.reserved;
	/* The kernel commits a page of a tmpfs file or a memfd when it allocates the page. */
	if (allocates_file && file.fd >= 0 && !source.page_size &&
	    (!(facts & MEMORY_DISK_FILE) || facts & MEMORY_STACKED))
		sources[count++] = (struct memory_source){ .kind = SOURCE_COMMIT,
							   .cost = !file.copied,
							   .file_bytes = source.file_bytes };
	if (allocates_file && file.fd >= 0)
		sources[count++] = file;
	return count;
}

bool pf_headroom_same(const struct memory_source *a, const struct memory_source *b)
{
	if (a->kind != b->kind)
		return false;
	if (a->kind == SOURCE_HOST || a->kind == SOURCE_COMMIT)
		return true;
	if (a->kind == SOURCE_FILE_SYSTEM)
		return a->device == b->device && a->inode == b->inode;
	return a->page_size == b->page_size && a->confined == b->confined &&
	       !memcmp(&a->nodes, &b->nodes, sizeof(a->nodes));
}

/*
 * Return the free memory that the kernel reserves (min_free_kbytes). If a node has less than its
 * share, an allocation that is bound to the node invokes the OOM killer (__setup_per_zone_wmarks()
 * in mm/page_alloc.c).
 */
static uint64_t kernel_reserve(void)
{
	char text[32];
	ssize_t length = min_free_fd < 0 ? -1 : pread(min_free_fd, text, sizeof(text) - 1, 0);

	if (length <= 0)
		return 0;
	text[length] = '\0';
	return strtoull(text, NULL, 10) << 10;
}

/*
 * Compute the free bytes of a file system, without those that other files may still allocate. Sets
 * *shared if the file system contains other files. Returns whether the plugin has found all of
 * these files. The function compares the number of inodes that it has found with the file system's
 * number of inodes, because it cannot find a file that another process has deleted.
 */
static bool file_system_left(const struct memory_source *source, uint64_t *left, bool *shared)
{
	uint64_t ours[FILES_MAX], used, found, committed;
	size_t deleted;
	size_t count = pf_ranges_inodes(source->device, ours, FILES_MAX, &deleted);

	*left = pf_source_file_system(source->fd, &used);
	*shared = *left != HEADROOM_UNLIMITED && (!used || used > count + 1);
	if (!*shared)
		return true;
	committed = pf_source_committed(source->fd, ours, (uint32_t)count, &found);
	if (committed == HEADROOM_UNLIMITED || !used || found + deleted < used)
		return false;
	*left = *left > committed ? *left - committed : 0;
	return true;
}

uint64_t pf_headroom_left(const struct memory_source *source, uint64_t ours, uint64_t reserve)
{
	uint64_t left = HEADROOM_UNLIMITED;
	bool shared = true;
	/* Walk the file system only once, because this function runs before each chunk. */
	bool visible = source->kind == SOURCE_FILE_SYSTEM ?
			       file_system_left(source, &left, &shared) :
			       pf_headroom_visible(source);

	if (!visible && pf_options.populate != POPULATE_ALL)
		return 0;
	switch (source->kind) {
	case SOURCE_FILE_SYSTEM:
		break;
	case SOURCE_KINDS:
	case SOURCE_HOST:
		left = pf_headroom();
		break;
	case SOURCE_COMMIT:
		left = pf_headroom_commit(overcommit_fd, meminfo_fd);
		break;
	case SOURCE_NODES:
		left = pf_source_nodes(nodes_fd, &source->nodes);
		reserve += kernel_reserve();
		break;
	case SOURCE_POOL:
		return hugetlb_left(source, ours); /* excludes pages reserved for others */
	}
	if (left == HEADROOM_UNLIMITED || !shared)
		return left;
	return left > reserve ? left - reserve : 0;
}

bool pf_headroom_visible(const struct memory_source *source)
{
	uint64_t left;
	bool shared;

	switch (source->kind) {
	case SOURCE_HOST:
		return sees_memory_groups;
	case SOURCE_POOL:
		return sees_hugetlb_groups;
	case SOURCE_FILE_SYSTEM:
		return file_system_left(source, &left, &shared);
	case SOURCE_COMMIT:
	case SOURCE_NODES:
	case SOURCE_KINDS:
		break;
	}
	return true;
}

uint64_t pf_headroom_unallocated(const struct memory_source *source)
{
	struct stat status;
	uint64_t allocated;

	if (source->kind != SOURCE_FILE_SYSTEM || source->fd < 0 || fstat(source->fd, &status))
		return UINT64_MAX;
	allocated = (uint64_t)status.st_blocks * 512;
	return (uint64_t)status.st_size > allocated ? (uint64_t)status.st_size - allocated : 0;
}

/* --- files that stay open --- */

static void open_nodes(void)
{
	char text[4096];
	ssize_t length = -1;
	int fd;

	if (nodes_fd >= 0)
		return;
	nodes_fd = open("/sys/devices/system/node", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	fd = nodes_fd < 0 ? -1 : openat(nodes_fd, "has_memory", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		length = read(fd, text, sizeof(text) - 1);
		close(fd);
	}
	if (length <= 0)
		return;
	text[length] = '\0';
	several_nodes = pf_source_parse_nodes(text, &nodes_with_memory) && strpbrk(text, ",-");
}

/* Each cgroup from QEMU's up to the root may have a limit. */
static void open_memory_groups(struct headroom_group *group)
{
	do {
		int directory = pf_headroom_open_group(group);

		if (directory >= 0)
			memory_groups[memory_group_count++] =
				(struct group){ directory, group->unified };
	} while (memory_group_count < CGROUP_LEVELS && pf_headroom_parent(group));
}

static bool has_hugetlb_limit(int directory, bool unified)
{
	return !faccessat(directory, unified ? "hugetlb.2MB.max" : "hugetlb.2MB.limit_in_bytes",
			  R_OK, 0) ||
	       !faccessat(directory, unified ? "hugetlb.1GB.max" : "hugetlb.1GB.limit_in_bytes",
			  R_OK, 0);
}

static void open_hugetlb_groups(struct headroom_group *group)
{
	do {
		int directory = open(group->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		if (directory < 0)
			continue;
		if (!has_hugetlb_limit(directory, group->unified)) {
			close(directory);
			continue;
		}
		hugetlb_groups[hugetlb_group_count++] = (struct group){ directory, group->unified };
	} while (hugetlb_group_count < CGROUP_LEVELS && pf_headroom_parent(group));
}

static void close_groups(void)
{
	while (memory_group_count)
		close(memory_groups[--memory_group_count].directory);
	while (hugetlb_group_count)
		close(hugetlb_groups[--hugetlb_group_count].directory);
}

static bool sees(const char *controller)
{
	return pf_headroom_sees_group("/proc/self/cgroup", "/proc/self/mountinfo",
				      "/proc/self/ns/cgroup", controller);
}

void pf_headroom_close(void)
{
	int *const fds[] = { &meminfo_fd, &overcommit_fd, &pools_fd, &nodes_fd, &min_free_fd };

	close_groups();
	for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

void pf_headroom_open(void)
{
	static struct headroom_group group;

	close_groups(); /* after a fork, these are the parent's cgroups */
	if (meminfo_fd < 0)
		meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
	if (overcommit_fd < 0)
		overcommit_fd = open("/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC);
	open_nodes();
	if (min_free_fd < 0)
		min_free_fd = open("/proc/sys/vm/min_free_kbytes", O_RDONLY | O_CLOEXEC);
	if (pools_fd < 0)
		pools_fd = open("/sys/kernel/mm/hugepages", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	sees_memory_groups = sees("memory");
	sees_hugetlb_groups = sees("hugetlb");
	if (pf_headroom_find_group("/proc/self/cgroup", "/proc/self/mountinfo", "memory", &group))
		open_memory_groups(&group);
	if (pf_headroom_find_group("/proc/self/cgroup", "/proc/self/mountinfo", "hugetlb", &group))
		open_hugetlb_groups(&group);
}
