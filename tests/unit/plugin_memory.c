// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Simulate the start of a guest that uses more huge pages than the host has.
 * test_native_plugin_memory.py links this file with the plugin's files.
 *
 * With the argument "learn", the plugin finds the mapping in /proc/self/smaps. With "hook", the
 * plugin's mmap() hook records the mapping. The program prints the page size in bytes, whether the
 * pool is too small (1 or 0), and the value of the populate option.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plugin/guest_start.h"
#include "plugin/headroom.h"
#include "plugin/host_ranges.h"
#include "plugin/options.h"
#include "plugin/state.h"

#define SIZE (64ull << 30)

static int short_of(const struct memslot *slot)
{
	struct memory_source sources[SOURCE_KINDS];
	size_t count = pf_headroom_sources(slot->hva, slot->size, sources);

	for (size_t i = 0; i < count; i++)
		if (sources[i].kind == SOURCE_POOL)
			return pf_headroom_left(&sources[i], 0, 0) < SIZE;
	return 0;
}

int main(int argc, char **argv)
{
	int flags = MAP_SHARED | MAP_NORESERVE;
	int fd = memfd_create("ram", MFD_HUGETLB);
	void *memory = MAP_FAILED;

	if (fd >= 0 && !ftruncate(fd, SIZE))
		memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED || argc != 2)
		return 77; /* this kernel has no huge pages */
	struct memslot slot = { .size = SIZE, .hva = (uint64_t)memory, .state = SLOT_KEPT };

	pf_ranges_open();
	pf_headroom_open();
	if (!strcmp(argv[1], "learn"))
		pf_ranges_learn();
	else
		pf_ranges_mapped((uint64_t)memory, SIZE, fd, flags);
	pf_options.populate = POPULATE_ALL;
	pf_capable = true;
	pf_memslots = &slot;
	pf_memslot_count = 1;
	printf("%llu\n", (unsigned long long)pf_ranges_huge_page_size(slot.hva, SIZE));
	printf("%d\n", short_of(&slot));
	pf_guest_start();
	printf("%s\n", pf_populate_names[pf_options.populate]);
	return 0;
}
