// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "host_memory.h"

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
	dev_t device; /* of the mapped file */
	ino_t inode;  /* 0: anonymous */
};

struct intervals {
	struct interval *items;
	size_t count, room;
};

static struct intervals mappings; /* with something to know about them */
static struct intervals marks[2];

enum { CGROUP_LEVELS = 16 };

static int pagemap_fd = -1;
static int meminfo_fd = -1;
static struct {
	int limit_fd, usage_fd;
} cgroups[CGROUP_LEVELS];
static int cgroup_count;

static void intervals_add(struct intervals *list, struct interval item)
{
	if (list->count == list->room) {
		size_t room = list->room ? 2 * list->room : 32;
		struct interval *items = realloc(list->items, room * sizeof(*items));

		if (!items)
			return; /* forgotten: what is unknown is populated, or populated twice */
		list->items = items;
		list->room = room;
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
		if (item.start < start)
			intervals_add(list, (struct interval){ item.start, start, item.facts,
							       item.device, item.inode });
		if (end < item.end)
			intervals_add(list, (struct interval){ end, item.end, item.facts,
							       item.device, item.inode });
	}
}

/* Shared files of these live in memory only. */
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

void memory_learn(void)
{
	struct interval item = { 0 };
	unsigned long long start, end, offset, inode;
	unsigned int major, minor;
	FILE *file = fopen("/proc/self/smaps", "re");
	char *line = NULL, permissions[5];
	size_t room = 0;
	int path;

	while (file && getline(&line, &room, file) > 0) {
		if (sscanf(line, "%llx-%llx %4s %llx %x:%x %llu %n", &start, &end, permissions,
			   &offset, &major, &minor, &inode, &path) == 7) {
			struct statfs filesystem = { .f_type = TMPFS_MAGIC };

			item = (struct interval){ .start = start, .end = end, .inode = inode,
						  .device = makedev(major, minor) };
			line[strcspn(line, "\n")] = '\0';
			/* A memfd has no path that could be asked; its flags tell of hugetlb. */
			if (inode && strncmp(line + path, "/memfd:", 7))
				statfs(line + path, &filesystem);
			if (inode)
				item.facts = file_facts((unsigned long)filesystem.f_type,
							permissions[3] == 's');
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

void memory_mapped(uint64_t start, uint64_t size, int fd, int flags)
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
		item.facts |= file_facts((unsigned long)filesystem.f_type, flags & MAP_SHARED);
	}
	if (item.facts || item.inode)
		intervals_add(&mappings, item);
}

void memory_discarded(uint64_t start, uint64_t size)
{
	intervals_add(&mappings, (struct interval){ start, start + size, MEMORY_HOLES, 0, 0 });
}

bool memory_file_discarded(int fd)
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

unsigned int memory_facts(uint64_t start, uint64_t size)
{
	unsigned int facts = 0;

	for (size_t i = 0; i < mappings.count; i++)
		if (mappings.items[i].start < start + size && start < mappings.items[i].end)
			facts |= mappings.items[i].facts;
	return facts;
}

void memory_set_mark(enum memory_mark mark, uint64_t start, uint64_t size)
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

bool memory_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
		     uint64_t *length)
{
	const struct intervals *marked = &marks[mark];
	uint64_t end = start + size;

	for (bool moved = true; moved;) { /* past everything that covers start */
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

uint64_t memory_present(uint64_t start, uint64_t size)
{
	uint64_t present = 0, writable;

	if (pagemap_fd < 0 ||
	    pagemap_sum(pagemap_fd, start, start + size, 0, &present, &writable))
		return 0;
	return present;
}

bool memory_next_resident(uint64_t *start, uint64_t end, uint64_t *length)
{
	bool is_private = memory_facts(*start, end - *start) & MEMORY_PRIVATE;
	struct pagemap_region region;
	uint64_t next;

	if (pagemap_fd < 0 ||
	    pagemap_writable(pagemap_fd, *start, end, is_private, &region, 1, &next) <= 0)
		return false;
	*start = region.start;
	*length = region.size;
	return true;
}

// What the host can give.

static uint64_t read_number(int fd, const char *behind)
{
	char text[4096];
	ssize_t length = pread(fd, text, sizeof(text) - 1, 0);
	const char *found = text;

	if (length <= 0)
		return UINT64_MAX;
	text[length] = '\0';
	if (behind) {
		found = strstr(text, behind);
		if (!found)
			return UINT64_MAX;
		found += strlen(behind);
	}
	if (!strncmp(found, "max", 3))
		return UINT64_MAX;
	return strtoull(found, NULL, 10);
}

uint64_t memory_headroom(void)
{
	uint64_t least = UINT64_MAX;

	if (meminfo_fd >= 0) {
		uint64_t kib = read_number(meminfo_fd, "MemAvailable:");

		if (kib < UINT64_MAX >> 10)
			least = kib << 10;
	}
	for (int i = 0; i < cgroup_count; i++) {
		uint64_t limit = read_number(cgroups[i].limit_fd, NULL);
		uint64_t usage = read_number(cgroups[i].usage_fd, NULL);

		if (limit != UINT64_MAX && usage != UINT64_MAX) {
			uint64_t left = limit > usage ? limit - usage : 0;

			least = left < least ? left : least;
		}
	}
	return least;
}

/* Every level from our cgroup up to the root may have a limit. */
static void open_cgroup(const char *root, char *path, const char *limit, const char *usage)
{
	char name[4600];

	while (cgroup_count < CGROUP_LEVELS) {
		snprintf(name, sizeof(name), "%s%s/%s", root, path, limit);
		int limit_fd = open(name, O_RDONLY | O_CLOEXEC);

		snprintf(name, sizeof(name), "%s%s/%s", root, path, usage);
		int usage_fd = open(name, O_RDONLY | O_CLOEXEC);

		if (limit_fd >= 0 && usage_fd >= 0) {
			cgroups[cgroup_count].limit_fd = limit_fd;
			cgroups[cgroup_count++].usage_fd = usage_fd;
		} else {
			if (limit_fd >= 0)
				close(limit_fd);
			if (usage_fd >= 0)
				close(usage_fd);
		}
		char *slash = strrchr(path, '/');

		if (!slash)
			return;
		*slash = '\0';
	}
}

void memory_open(void)
{
	char line[4200];

	if (pagemap_fd >= 0) { /* that of another address space, after a fork */
		close(pagemap_fd);
		for (int i = 0; i < cgroup_count; i++) {
			close(cgroups[i].limit_fd);
			close(cgroups[i].usage_fd);
		}
		cgroup_count = 0;
	}
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (meminfo_fd < 0)
		meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
	FILE *file = fopen("/proc/self/cgroup", "re");

	if (!file)
		return;
	while (fgets(line, sizeof(line), file)) { /* hierarchy:controllers:path */
		char *controllers = strchr(line, ':');
		char *path = controllers ? strchr(controllers + 1, ':') : NULL;

		if (!path)
			continue;
		*path++ = '\0';
		path[strcspn(path, "\n")] = '\0';
		if (!strcmp(path, "/"))
			*path = '\0';
		if (!controllers[1])
			open_cgroup("/sys/fs/cgroup", path, "memory.max", "memory.current");
		else if (!strcmp(controllers + 1, "memory"))
			open_cgroup("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
				    "memory.usage_in_bytes");
	}
	fclose(file);
}
