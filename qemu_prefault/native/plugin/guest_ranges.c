// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "guest_ranges.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "os.h"

struct candidate {
	atomic_uint_least64_t start, end;
	dev_t device;
	ino_t inode; /* 0: anonymous */
};

static struct candidates {
	struct candidate items[127]; /* the struct fits into a page */
	atomic_size_t count;
	struct candidates *_Atomic next;
} candidates;
static atomic_bool candidates_incomplete; /* an entry was lost for lack of memory */

/* Serializes add(). A thread that holds this lock takes no other lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(uint64_t from, uint64_t to, dev_t device, ino_t inode)
{
	struct candidates *block = &candidates, *next;
	size_t count;

	for (;; block = next) {
		count = atomic_load(&block->count);
		for (size_t i = 0; i < count; i++) {
			struct candidate *known = &block->items[i];
			uint64_t start = atomic_load(&known->start), end = atomic_load(&known->end);

			if (known->inode != inode || known->device != device || to < start ||
			    end < from)
				continue;
			if (from < start)
				atomic_store(&known->start, from);
			if (to > end)
				atomic_store(&known->end, to);
			return;
		}
		next = atomic_load(&block->next);
		if (!next)
			break;
	}
	if (count == sizeof(block->items) / sizeof(*block->items)) {
		next = pf_raw_mmap(NULL, sizeof(*next), PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (next == MAP_FAILED) {
			atomic_store(&candidates_incomplete, true);
			return;
		}
		atomic_store(&block->next, next);
		block = next;
		count = 0;
	}
	struct candidate *added = &block->items[count];

	atomic_store(&added->start, from);
	atomic_store(&added->end, to);
	added->device = device;
	added->inode = inode;
	atomic_store(&block->count, count + 1);
}

bool pf_guest_ranges_touch(uint64_t start, uint64_t size)
{
	for (struct candidates *block = &candidates; block; block = atomic_load(&block->next))
		for (size_t i = 0, count = atomic_load(&block->count); i < count; i++)
			if (atomic_load(&block->items[i].start) < start + size &&
			    start < atomic_load(&block->items[i].end))
				return true;
	return atomic_load(&candidates_incomplete);
}

bool pf_guest_ranges_have_file(int fd)
{
	struct stat status;

	if (fstat(fd, &status))
		return false;
	for (struct candidates *block = &candidates; block; block = atomic_load(&block->next))
		for (size_t i = 0, count = atomic_load(&block->count); i < count; i++)
			if (block->items[i].inode == status.st_ino &&
			    block->items[i].device == status.st_dev)
				return true;
	return atomic_load(&candidates_incomplete);
}

bool pf_guest_ranges_exist(void)
{
	return atomic_load(&candidates.count) > 0;
}

void pf_guest_ranges_add(uint64_t start, uint64_t end, dev_t device, ino_t inode)
{
	pthread_mutex_lock(&lock);
	add(start, end, device, inode);
	pthread_mutex_unlock(&lock);
}
