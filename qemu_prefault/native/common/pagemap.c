// SPDX-License-Identifier: GPL-2.0-or-later
/* Find the present and the writable pages of a process in /proc/PID/pagemap. */
#define _GNU_SOURCE
#include "pagemap.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From Documentation/admin-guide/mm/pagemap.rst. Debian 12's headers do not define PAGEMAP_SCAN. */
struct page_region_6_7 {
	uint64_t start, end, categories;
};

struct pm_scan_arg_6_7 {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN_6_7 _IOWR('f', 16, struct pm_scan_arg_6_7)
#define CATEGORY_FILE (1u << 2)
#define CATEGORY_PRESENT (1u << 3)
#define CATEGORY_PFNZERO (1u << 5)

#define ENTRY_FILE (1ull << 61)
#define ENTRY_PRESENT (1ull << 63)

#define PAGE 4096ull
#define SCAN_REGIONS 512
#define READ_ENTRIES 8192

struct scan {
	int fd, is_private;
	uint64_t must_be, must_not_be; /* categories */
};

/*
 * Issue one PAGEMAP_SCAN. Returns the number of regions or -errno. Sets *next to the end of the
 * scan.
 */
static long scan_categories(const struct scan *scan, uint64_t start, uint64_t end,
			    struct page_region_6_7 *found, size_t count, uint64_t *next)
{
	struct pm_scan_arg_6_7 arg = {
		.size = sizeof(arg),
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)found,
		.vec_len = count,
		.category_inverted = scan->must_not_be,
		.category_mask = scan->must_be | scan->must_not_be,
		.return_mask = CATEGORY_PRESENT,
	};
	/* Do not call ioctl(), because it may be the plugin's hook (plugin/os.h). */
	long got = syscall(SYS_ioctl, scan->fd, PAGEMAP_SCAN_6_7, &arg);

	if (got < 0)
		return -errno;
	*next = arg.walk_end;
	return got;
}

/*
 * Like scan_categories(), but read pagemap entries, for Linux before 6.7, which lacks PAGEMAP_SCAN.
 */
static long scan_entries(const struct scan *scan, uint64_t start, uint64_t end,
			 struct page_region_6_7 *found, size_t count, uint64_t *next)
{
	uint64_t entries[READ_ENTRIES];
	uint64_t pages = (end - start) / PAGE;
	ssize_t bytes;
	size_t used = 0;

	if (pages > READ_ENTRIES)
		pages = READ_ENTRIES;
	bytes = pread(scan->fd, entries, pages * sizeof(entries[0]),
		      (off_t)(start / PAGE * sizeof(entries[0])));
	if (bytes <= 0) /* 0: the process has no memory any more (pagemap_read()) */
		return bytes ? -errno : -ESRCH;
	pages = (uint64_t)bytes / sizeof(entries[0]);
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t at = start + i * PAGE;

		if (!(entries[i] & ENTRY_PRESENT))
			continue;
		if ((scan->must_not_be & CATEGORY_FILE) && (entries[i] & ENTRY_FILE))
			continue;
		if (used && found[used - 1].end == at) {
			found[used - 1].end += PAGE;
			continue;
		}
		if (used == count) {
			*next = at;
			return (long)used;
		}
		found[used++] = (struct page_region_6_7){ at, at + PAGE, 0 };
	}
	*next = start + pages * PAGE;
	return (long)used;
}

static long scan_some(const struct scan *scan, uint64_t start, uint64_t end,
		      struct page_region_6_7 *found, size_t count, uint64_t *next)
{
	long got = scan_categories(scan, start, end, found, count, next);

	if (got == -ENOTTY || got == -EINVAL)
		got = scan_entries(scan, start, end, found, count, next);
	return got;
}

static struct scan scan_writable(int fd, int is_private)
{
	return (struct scan){ .fd = fd,
			      .must_be = CATEGORY_PRESENT,
			      .must_not_be = CATEGORY_PFNZERO | (is_private ? CATEGORY_FILE : 0) };
}

long pf_pagemap_writable(int32_t fd, uint64_t start, uint64_t end, int32_t is_private,
			 struct pagemap_region *regions, size_t count, uint64_t *next)
{
	struct scan scan = scan_writable(fd, is_private);
	struct page_region_6_7 found[SCAN_REGIONS];
	size_t used = 0;

	*next = start;
	while (*next < end && used < count) {
		size_t capacity = count - used < SCAN_REGIONS ? count - used : SCAN_REGIONS;
		uint64_t from = *next;
		long got = scan_some(&scan, from, end, found, capacity, next);

		if (got < 0)
			return got;
		for (long i = 0; i < got; i++) {
			struct pagemap_region *last = used ? &regions[used - 1] : NULL;

			if (last && last->start + last->size == found[i].start)
				last->size += found[i].end - found[i].start;
			else
				regions[used++] =
					(struct pagemap_region){ found[i].start,
								 found[i].end - found[i].start };
		}
		if (*next <= from) /* no progress: end the loop */
			return -EIO;
	}
	return (long)used;
}

static long sum(const struct scan *scan, uint64_t start, uint64_t end, uint64_t *bytes)
{
	struct page_region_6_7 found[SCAN_REGIONS];
	uint64_t next = start;

	*bytes = 0;
	while (next < end) {
		uint64_t from = next;
		long got = scan_some(scan, from, end, found, SCAN_REGIONS, &next);

		if (got < 0)
			return got;
		for (long i = 0; i < got; i++)
			*bytes += found[i].end - found[i].start;
		if (next <= from)
			return -EIO;
	}
	return 0;
}

long pf_pagemap_sum(int32_t fd, uint64_t start, uint64_t end, int32_t is_private, uint64_t *present,
		    uint64_t *writable)
{
	struct scan any = { .fd = fd, .must_be = CATEGORY_PRESENT };
	struct scan rw = scan_writable(fd, is_private);
	long failed = sum(&any, start, end, present);

	return failed ? failed : sum(&rw, start, end, writable);
}
