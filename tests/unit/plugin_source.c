// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest about to start on a file, linked with the plugin's files by
 * test_native_plugin_source.py: PATH SIZE shared|private hook|learn. Prints how it is populated.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plugin/guest_start.h"
#include "plugin/headroom.h"
#include "plugin/host_ranges.h"
#include "plugin/options.h"
#include "plugin/state.h"

int main(int argc, char **argv)
{
	int fd = argc == 5 ? open(argv[1], O_RDWR | O_CREAT, 0600) : -1;
	uint64_t size = argc == 5 ? strtoull(argv[2], NULL, 10) : 0;
	int flags = argc == 5 && !strcmp(argv[3], "shared") ? MAP_SHARED : MAP_PRIVATE;
	void *memory = MAP_FAILED;

	if (fd >= 0 && !ftruncate(fd, (off_t)size))
		memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		return 1;
	struct memslot slot = { .size = size, .hva = (uint64_t)memory, .state = SLOT_KEPT };

	pf_ranges_open();
	pf_headroom_open();
	if (!strcmp(argv[4], "learn"))
		pf_ranges_learn();
	else
		pf_ranges_mapped(slot.hva, size, fd, flags);
	pf_options.populate = POPULATE_ALL;
	pf_capable = true;
	pf_memslots = &slot;
	pf_memslot_count = 1;
	pf_guest_start();
	printf("%s\n", pf_populate_names[pf_options.populate]);
	return 0;
}
