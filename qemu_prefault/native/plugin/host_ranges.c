// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "host_ranges.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "common/pagemap.h"

struct interval {
	uint64_t start, end;
	unsigned int facts;
	uint64_t page_size; /* huge page size, or 0 */
	dev_t device;	    /* device of the mapped file */
	ino_t inode;	    /* 0: anonymous */
};

struct intervals {
	struct interval *items;
	size_t count, capacity;
};

static struct intervals mappings; /* mappings with facts or a file */
static struct intervals marks[2];

static int pagemap_fd = -1;

static void intervals_add(struct intervals *list, struct interval item)
{
	if (list->count == list->capacity) {
		size_t capacity = list->capacity ? 2 * list->capacity : 32;
		struct interval *items = realloc(list->items, capacity * sizeof(*items));

		if (!items)
			return; /* out of memory: the fact is lost; pages may be populated twice */
		list->items = items;
		list->capacity = capacity;
	}
	list->items[list->count++] = item;
}

static void intervals_cut(struct intervals *list, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < list->count;) {
		struct interval item = list->items[i];

		if (item.end <= start || end <= item.start) {
			i++;
			continue;
		}
		list->items[i] = list->items[--list->count];
		struct interval before = item, after = item;

		before.end = start;
		after.start = end;
		if (item.start < start)
			intervals_add(list, before);
		if (end < item.end)
			intervals_add(list, after);
	}
}

/* Return the facts of a file mapping. Files on tmpfs and hugetlbfs exist only in memory. */
static unsigned int file_facts(unsigned long filesystem, bool shared)
{
	unsigned int facts = shared ? 0 : MEMORY_PRIVATE;

	if (filesystem == HUGETLBFS_MAGIC)
		return facts | MEMORY_HUGETLB;
	return facts | (filesystem != TMPFS_MAGIC && shared ? MEMORY_DISK_FILE : 0);
}

static bool has_flag(const char *line, const char *flag)
{
	const char *found = strstr(line, flag);

	return found && found[-1] == ' ' && (found[2] == ' ' || found[2] == '\n');
}

void pf_ranges_learn(void)
{
	struct interval item = { 0 };
	unsigned long long start, end, offset, inode, kib;
	unsigned int major, minor;
	FILE *file = fopen("/proc/self/smaps", "re");
	char *line = NULL, permissions[5];
	size_t capacity = 0;
	int path;

	while (file && getline(&line, &capacity, file) > 0) {
		if (sscanf(line, "%llx-%llx %4s %llx %x:%x %llu %n", &start, &end, permissions,
			   &offset, &major, &minor, &inode, &path) == 7) {
			struct statfs filesystem = { .f_type = TMPFS_MAGIC };

			item = (struct interval){ .start = start,
						  .end = end,
						  .inode = inode,
						  .device = makedev(major, minor) };
			line[strcspn(line, "\n")] = '\0';
			/* A memfd has no path for statfs(). The "ht" flag below shows hugetlb. */
			if (inode && strncmp(line + path, "/memfd:", 7))
				statfs(line + path, &filesystem);
			if (inode)
				item.facts = file_facts((unsigned long)filesystem.f_type,
							permissions[3] == 's');
		} else if (sscanf(line, "KernelPageSize: %llu kB", &kib) == 1) {
			item.page_size = kib << 10;
		} else if (!strncmp(line, "VmFlags:", 8) && permissions[1] == 'w') {
			if (has_flag(line, "nr"))
				item.facts |= MEMORY_OVERCOMMIT;
			if (has_flag(line, "ht"))
				item.facts |= MEMORY_HUGETLB;
			if (item.facts || item.inode)
				intervals_add(&mappings, item);
		}
	}
	free(line);
	if (file)
		fclose(file);
}

void pf_ranges_mapped(uint64_t start, uint64_t size, int fd, int flags)
{
	struct interval item = { .start = start, .end = start + size };
	struct stat status;
	struct statfs filesystem;

	intervals_cut(&mappings, item.start, item.end);
	intervals_cut(&marks[MEMORY_POPULATED], item.start, item.end);
	intervals_cut(&marks[MEMORY_PREFAULTED], item.start, item.end);
	if (flags & MAP_NORESERVE)
		item.facts |= MEMORY_OVERCOMMIT;
	if (fd >= 0 && !fstat(fd, &status) && !fstatfs(fd, &filesystem)) {
		item.device = status.st_dev;
		item.inode = status.st_ino;
		item.page_size = (uint64_t)filesystem.f_bsize; /* on hugetlbfs: the page size */
		item.facts |= file_facts((unsigned long)filesystem.f_type, flags & MAP_SHARED);
	}
	if (item.facts || item.inode)
		intervals_add(&mappings, item);
}

void pf_ranges_discarded(uint64_t start, uint64_t size)
{
	intervals_add(&mappings, (struct interval){ .start = start,
						    .end = start + size,
						    .facts = MEMORY_HOLES });
}

bool pf_ranges_file_discarded(int fd)
{
	struct stat status;
	bool known = false;

	if (fstat(fd, &status))
		return false;
	for (size_t i = 0; i < mappings.count; i++) {
		struct interval *item = &mappings.items[i];

		if (item->inode == status.st_ino && item->device == status.st_dev) {
			item->facts |= MEMORY_HOLES;
			known = true;
		}
	}
	return known;
}

unsigned int pf_ranges_facts(uint64_t start, uint64_t size)
{
	unsigned int facts = 0;

	for (size_t i = 0; i < mappings.count; i++)
		if (mappings.items[i].start < start + size && start < mappings.items[i].end)
			facts |= mappings.items[i].facts;
	return facts;
}

uint64_t pf_ranges_huge_page_size(uint64_t start, uint64_t size)
{
	for (size_t i = 0; i < mappings.count; i++) {
		const struct interval *item = &mappings.items[i];

		if (item->facts & MEMORY_HUGETLB && item->start < start + size && start < item->end)
			return item->page_size;
	}
	return 0;
}

void pf_ranges_set_mark(enum memory_mark mark, uint64_t start, uint64_t size)
{
	struct intervals *marked = &marks[mark];
	uint64_t end = start + size;

	for (size_t i = 0; i < marked->count; i++) {
		struct interval *item = &marked->items[i];

		if (item->start <= end && start <= item->end) {
			start = start < item->start ? start : item->start;
			end = end > item->end ? end : item->end;
		}
	}
	intervals_cut(marked, start, end);
	intervals_add(marked, (struct interval){ .start = start, .end = end });
}

bool pf_ranges_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
			uint64_t *length)
{
	const struct intervals *marked = &marks[mark];
	uint64_t end = start + size;

	for (bool moved = true; moved;) { /* skip all intervals that cover start */
		moved = false;
		for (size_t i = 0; i < marked->count; i++) {
			const struct interval *item = &marked->items[i];

			if (item->start <= start && start < item->end) {
				start = item->end;
				moved = true;
			}
		}
	}
	if (start >= end)
		return false;
	for (size_t i = 0; i < marked->count; i++)
		if (start < marked->items[i].start && marked->items[i].start < end)
			end = marked->items[i].start;
	*from = start;
	*length = end - start;
	return true;
}

uint64_t pf_ranges_present(uint64_t start, uint64_t size)
{
	uint64_t present = 0, writable;

	if (pagemap_fd < 0 ||
	    pf_pagemap_sum(pagemap_fd, start, start + size, 0, &present, &writable))
		return 0;
	return present;
}

bool pf_ranges_next_resident(uint64_t *start, uint64_t end, uint64_t *length)
{
	bool is_private = pf_ranges_facts(*start, end - *start) & MEMORY_PRIVATE;
	struct pagemap_region region;
	uint64_t next;

	if (pagemap_fd < 0 ||
	    pf_pagemap_writable(pagemap_fd, *start, end, is_private, &region, 1, &next) <= 0)
		return false;
	*start = region.start;
	*length = region.size;
	return true;
}

void pf_ranges_open(void)
{
	if (pagemap_fd >= 0) /* after a fork it belongs to another address space */
		close(pagemap_fd);
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}
