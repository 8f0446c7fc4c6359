// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "host_ranges.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "common/memory_source.h"
#include "common/pagemap.h"
#include "guest_ranges.h"
#include "os.h"

struct interval {
	uint64_t start, end;
	unsigned int facts;
	uint64_t page_size; /* huge page size, or 0 */
	dev_t device;	    /* device of the mapped file */
	ino_t inode;	    /* 0: anonymous */
	int fd;		    /* QEMU's descriptor for the file, owned by QEMU; -1: unknown */
};

struct intervals {
	struct interval *items;
	size_t count, capacity;
};

static struct intervals mappings; /* mappings with facts or a file */
static struct intervals marks[2];

static int pagemap_fd = -1;

/*
 * Protects mappings and marks. A thread that holds this lock must not allocate, and may take no
 * other lock than the one in guest_ranges.c.
 */
static pthread_mutex_t lists_lock = PTHREAD_MUTEX_INITIALIZER;

static void intervals_add(struct intervals *list, struct interval item)
{
	if (!pf_grow((void **)&list->items, &list->capacity, list->count, sizeof(*list->items)))
		return; /* no memory: the fact is lost, and pages may be populated twice */
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

/* Return the facts of a file mapping. */
static unsigned int file_facts(unsigned long filesystem, dev_t device, bool shared)
{
	unsigned int facts = shared ? 0 : MEMORY_PRIVATE;
	bool stacked = pf_source_is_stacked(filesystem, device);

	switch (filesystem) {
	case HUGETLBFS_MAGIC:
		return facts | MEMORY_HUGETLB;
	case TMPFS_MAGIC: /* also devtmpfs, and memfds */
	case RAMFS_MAGIC:
		return facts | (shared ? 0 : MEMORY_COPIED);
	default:
		facts |= stacked ? MEMORY_STACKED : 0;
		return facts | (shared ? MEMORY_DISK_FILE : stacked ? MEMORY_COPIED : 0);
	}
}

static bool has_flag(const char *line, const char *flag)
{
	const char *found = strstr(line, flag);

	return found && found[-1] == ' ' && (found[2] == ' ' || found[2] == '\n');
}

/*
 * Find QEMU's descriptors for the mapped files. A descriptor also shows the file system of a
 * deleted file.
 */
static void learn_descriptors(void)
{
	const unsigned int of_file = MEMORY_DISK_FILE | MEMORY_COPIED | MEMORY_STACKED;
	DIR *directory = opendir("/proc/self/fd");
	const struct dirent *entry;
	struct stat status;
	struct statfs filesystem;

	while (directory && (entry = readdir(directory))) {
		/* NOLINTNEXTLINE(clang-analyzer-unix.StdCLibraryFunctions): directory is open */
		if (fstatat(dirfd(directory), entry->d_name, &status, 0) ||
		    fstatfs(atoi(entry->d_name), &filesystem))
			continue;
		pthread_mutex_lock(&lists_lock);
		for (size_t i = 0; i < mappings.count; i++) {
			struct interval *item = &mappings.items[i];

			if (!item->inode || item->inode != status.st_ino ||
			    item->device != status.st_dev)
				continue;
			item->fd = atoi(entry->d_name);
			item->facts &= ~of_file;
			item->facts |= file_facts((unsigned long)filesystem.f_type, item->device,
						  !(item->facts & MEMORY_PRIVATE));
		}
		pthread_mutex_unlock(&lists_lock);
	}
	if (directory)
		closedir(directory);
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
						  .device = makedev(major, minor),
						  .fd = -1 };
			/* NOLINTNEXTLINE(clang-analyzer-security.ArrayBound): at most strlen() */
			line[strcspn(line, "\n")] = '\0';
			/* A memfd has no path for statfs(). The "ht" flag below marks hugetlb. */
			if (inode && strncmp(line + path, "/memfd:", 7))
				statfs(line + path, &filesystem);
			if (inode)
				item.facts = file_facts((unsigned long)filesystem.f_type,
							item.device, permissions[3] == 's');
		} else if (sscanf(line, "KernelPageSize: %llu kB", &kib) == 1) {
			item.page_size = kib << 10;
		} else if (!strncmp(line, "VmFlags:", 8) && permissions[1] == 'w') {
			if (has_flag(line, "nr"))
				item.facts |= MEMORY_OVERCOMMIT;
			if (has_flag(line, "ht"))
				item.facts |= MEMORY_HUGETLB;
			pthread_mutex_lock(&lists_lock);
			if (item.facts || item.inode)
				intervals_add(&mappings, item);
			/* QEMU's RAM has MADV_DONTFORK (ram_block_add(), system/physmem.c). */
			if (item.facts || item.inode || has_flag(line, "dc"))
				pf_guest_ranges_add(item.start, item.end, item.device, item.inode);
			pthread_mutex_unlock(&lists_lock);
		}
	}
	free(line);
	if (file)
		fclose(file);
	learn_descriptors();
}

void pf_ranges_mapped(uint64_t start, uint64_t size, int fd, int flags)
{
	struct interval item = { .start = start, .end = start + size, .fd = fd };
	struct stat status;
	struct statfs filesystem;

	if (flags & MAP_NORESERVE)
		item.facts |= MEMORY_OVERCOMMIT;
	if (fd >= 0 && !fstat(fd, &status) && !fstatfs(fd, &filesystem)) {
		item.device = status.st_dev;
		item.inode = status.st_ino;
		item.page_size = (uint64_t)filesystem.f_bsize; /* on hugetlbfs: the page size */
		item.facts |= file_facts((unsigned long)filesystem.f_type, item.device,
					 flags & MAP_SHARED);
	}
	pthread_mutex_lock(&lists_lock);
	intervals_cut(&mappings, item.start, item.end);
	intervals_cut(&marks[MEMORY_POPULATED], item.start, item.end);
	intervals_cut(&marks[MEMORY_PREFAULTED], item.start, item.end);
	if (item.facts || item.inode)
		intervals_add(&mappings, item);
	pf_guest_ranges_add(item.start, item.end, item.device, item.inode);
	pthread_mutex_unlock(&lists_lock);
}

void pf_ranges_discarded(uint64_t start, uint64_t size)
{
	pthread_mutex_lock(&lists_lock);
	intervals_add(&mappings, (struct interval){ .start = start,
						    .end = start + size,
						    .facts = MEMORY_HOLES });
	pthread_mutex_unlock(&lists_lock);
}

bool pf_ranges_file_discarded(int fd)
{
	struct stat status;
	bool known = false;

	if (fstat(fd, &status))
		return false;
	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < mappings.count; i++) {
		struct interval *item = &mappings.items[i];

		if (item->inode == status.st_ino && item->device == status.st_dev) {
			item->facts |= MEMORY_HOLES;
			known = true;
		}
	}
	pthread_mutex_unlock(&lists_lock);
	return known;
}

unsigned int pf_ranges_facts(uint64_t start, uint64_t size)
{
	unsigned int facts = 0;

	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < mappings.count; i++)
		if (mappings.items[i].start < start + size && start < mappings.items[i].end)
			facts |= mappings.items[i].facts;
	pthread_mutex_unlock(&lists_lock);
	return facts;
}

uint64_t pf_ranges_huge_page_size(uint64_t start, uint64_t size)
{
	uint64_t page_size = 0;

	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < mappings.count && !page_size; i++) {
		const struct interval *item = &mappings.items[i];

		if (item->facts & MEMORY_HUGETLB && item->start < start + size && start < item->end)
			page_size = item->page_size;
	}
	pthread_mutex_unlock(&lists_lock);
	return page_size;
}

int pf_ranges_file(uint64_t start, uint64_t size, uint64_t *device, uint64_t *inode)
{
	struct interval found = { .fd = -1 };
	struct stat status;

	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < mappings.count && found.fd < 0; i++)
		if (mappings.items[i].inode && mappings.items[i].start < start + size &&
		    start < mappings.items[i].end)
			found = mappings.items[i];
	pthread_mutex_unlock(&lists_lock);
	/* QEMU may have closed the descriptor and reused its number for another file. */
	if (found.fd < 0 || fstat(found.fd, &status) || status.st_ino != found.inode ||
	    status.st_dev != found.device)
		return -1;
	*device = found.device;
	*inode = found.inode;
	return found.fd;
}

size_t pf_ranges_inodes(uint64_t device, uint64_t *inodes, size_t most, size_t *deleted)
{
	size_t count = 0;

	*deleted = 0;
	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < mappings.count && count < most; i++) {
		const struct interval *item = &mappings.items[i];
		bool again = !item->inode || item->device != device;
		struct stat status;

		for (size_t j = 0; j < count && !again; j++)
			again = inodes[j] == item->inode;
		if (again)
			continue;
		inodes[count++] = item->inode;
		*deleted += item->fd >= 0 && !fstat(item->fd, &status) &&
			    status.st_ino == item->inode && status.st_dev == item->device &&
			    !status.st_nlink;
	}
	pthread_mutex_unlock(&lists_lock);
	return count;
}

void pf_ranges_set_mark(enum memory_mark mark, uint64_t start, uint64_t size)
{
	struct intervals *marked = &marks[mark];
	uint64_t end = start + size;

	pthread_mutex_lock(&lists_lock);
	for (size_t i = 0; i < marked->count; i++) {
		struct interval *item = &marked->items[i];

		if (item->start <= end && start <= item->end) {
			start = start < item->start ? start : item->start;
			end = end > item->end ? end : item->end;
		}
	}
	intervals_cut(marked, start, end);
	intervals_add(marked, (struct interval){ .start = start, .end = end });
	pthread_mutex_unlock(&lists_lock);
}

bool pf_ranges_unmarked(enum memory_mark mark, uint64_t start, uint64_t size, uint64_t *from,
			uint64_t *length)
{
	const struct intervals *marked = &marks[mark];
	uint64_t end = start + size;

	pthread_mutex_lock(&lists_lock);
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
	for (size_t i = 0; i < marked->count; i++)
		if (start < marked->items[i].start && marked->items[i].start < end)
			end = marked->items[i].start;
	pthread_mutex_unlock(&lists_lock);
	if (start >= end)
		return false;
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

void pf_ranges_close(void)
{
	if (pagemap_fd >= 0)
		close(pagemap_fd);
	pagemap_fd = -1;
}

void pf_ranges_open(void)
{
	pf_ranges_close(); /* after a fork, this is the parent's address space */
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}
