// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "headroom.h"

#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#include "common/headroom.h"

enum { CGROUP_LEVELS = 16 };

static int meminfo_fd = -1, pools_fd = -1;
static struct headroom_files memory_groups[CGROUP_LEVELS];
static int memory_group_count;
static struct {
	int directory;
	int unified;
} hugetlb_groups[CGROUP_LEVELS];
static int hugetlb_group_count;

uint64_t pf_headroom(void)
{
	uint64_t least = pf_headroom_host(meminfo_fd);

	for (int i = 0; i < memory_group_count; i++)
		least = pf_headroom_group(&memory_groups[i], least);
	return least;
}

uint64_t pf_headroom_huge(uint64_t page_size)
{
	uint64_t least = HEADROOM_UNLIMITED;

	if (pools_fd >= 0)
		least = pf_headroom_hugetlb_pool(pools_fd, page_size);
	for (int i = 0; i < hugetlb_group_count; i++) {
		uint64_t left = pf_headroom_hugetlb_group(hugetlb_groups[i].directory,
							  hugetlb_groups[i].unified, page_size);

		least = left < least ? left : least;
	}
	return least;
}

/* Each cgroup from QEMU's up to the root may have a limit. */
static void open_memory_groups(struct headroom_group *group)
{
	do {
		struct headroom_files *files = &memory_groups[memory_group_count];

		pf_headroom_open_group(group, files);
		if (files->usage >= 0)
			memory_group_count++;
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
		hugetlb_groups[hugetlb_group_count].directory = directory;
		hugetlb_groups[hugetlb_group_count++].unified = group->unified;
	} while (hugetlb_group_count < CGROUP_LEVELS && pf_headroom_parent(group));
}

static void close_groups(void)
{
	while (memory_group_count)
		pf_headroom_close_group(&memory_groups[--memory_group_count]);
	while (hugetlb_group_count)
		close(hugetlb_groups[--hugetlb_group_count].directory);
}

void pf_headroom_open(void)
{
	static struct headroom_group group;

	close_groups(); /* after a fork, those of the parent process */
	if (meminfo_fd < 0)
		meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
	if (pools_fd < 0)
		pools_fd = open("/sys/kernel/mm/hugepages", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (pf_headroom_find_group("/proc/self/cgroup", "/proc/self/mountinfo", "memory", &group))
		open_memory_groups(&group);
	if (pf_headroom_find_group("/proc/self/cgroup", "/proc/self/mountinfo", "hugetlb", &group))
		open_hugetlb_groups(&group);
}
