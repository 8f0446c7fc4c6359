// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Simulate the start of a guest whose RAM is a file, and print the plugin's populate policy.
 *
 * Arguments: PATH SIZE shared|private hook|learn|deferred [OTHER-PATH OTHER-SIZE | late | crowd].
 * With "deferred", the memory is low RAM, which waits for the firmware. With OTHER-PATH, the program allocates another file after the guest has started, and also prints how
 * many MiB the plugin then populates. With "late", it populates in turns whose time limit has
 * expired before they begin, and also prints how many KiB the largest turn and all turns populate.
 * With "crowd", 16 threads populate, and the program also prints how many of them populated at the
 * same time, and how many MiB they populated.
 * test_native_plugin_source.py links this file with the plugin's files.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plugin/chunk.h"
#include "plugin/guest_start.h"
#include "plugin/headroom.h"
#include "plugin/host_ranges.h"
#include "plugin/options.h"
#include "plugin/queue.h"
#include "plugin/state.h"

/* Allocate another file, populate guest RAM, and return the bytes that were populated. */
static uint64_t populate_after(const char *other, uint64_t size)
{
	static struct kvm_run run;
	struct vcpu vcpu = { .fd = -1, .run = &run };
	struct run_ctx ctx = { .vcpu = &vcpu, .chunk_bytes = CHUNK };
	struct work_item item;
	int fd = open(other, O_RDWR | O_CREAT, 0600);

	if (fd < 0 || (size && posix_fallocate(fd, 0, (off_t)size)))
		return 0;
	pthread_mutex_lock(&pf_lock);
	while (pf_queue_take(&item, true))
		pf_chunk_run(item, &ctx);
	pthread_mutex_unlock(&pf_lock);
	return pf_counters.populated;
}

/* Populate guest RAM in turns whose time limit has expired, until a turn does nothing. */
static void populate_late(void)
{
	static struct kvm_run run;
	struct vcpu vcpu = { .fd = -1, .run = &run };
	struct work_item item;
	uint64_t largest = 0, before, pending;

	pthread_mutex_lock(&pf_lock);
	do {
		struct run_ctx ctx = { .vcpu = &vcpu, .deadline = 1, .chunk_bytes = MIB(1) / 4 };

		before = pf_counters.populated;
		pending = pf_queue_pending_bytes();
		if (pf_queue_take(&item, true))
			pf_chunk_run(item, &ctx);
		if (pf_counters.populated - before > largest)
			largest = pf_counters.populated - before;
	} while (pf_counters.populated != before || pf_queue_pending_bytes() != pending);
	pthread_mutex_unlock(&pf_lock);
	printf("%llu %llu\n", (unsigned long long)largest >> 10,
	       (unsigned long long)pf_counters.populated >> 10);
}

#define CROWD 16

static int most_populating;

/* Populate as a waiting vCPU thread does. */
static void *populate_in_crowd(void *unused)
{
	struct kvm_run run = { 0 };
	struct vcpu vcpu = { .fd = -1, .run = &run };
	struct run_ctx ctx = { .vcpu = &vcpu, .chunk_bytes = CHUNK };
	struct work_item item;

	(void)unused;
	pthread_mutex_lock(&pf_lock);
	while (pf_queue_pending_bytes()) {
		if (pf_populating > most_populating)
			most_populating = pf_populating;
		if (pf_queue_take(&item, true))
			pf_chunk_run(item, &ctx);
		else if (pf_populating)
			pthread_cond_wait(&pf_changed, &pf_lock);
		else
			break;
	}
	pthread_mutex_unlock(&pf_lock);
	return NULL;
}

static void populate_crowded(void)
{
	pthread_t threads[CROWD];

	pthread_mutex_lock(&pf_lock);
	for (int i = 0; i < CROWD; i++)
		if (pthread_create(&threads[i], NULL, populate_in_crowd, NULL))
			exit(1);
	pthread_mutex_unlock(&pf_lock); /* so that all threads begin at the same time */
	for (int i = 0; i < CROWD; i++)
		pthread_join(threads[i], NULL);
	printf("%d %llu\n", most_populating, (unsigned long long)pf_counters.populated >> 20);
}

int main(int argc, char **argv)
{
	int fd = argc >= 5 ? open(argv[1], O_RDWR | O_CREAT, 0600) : -1;
	uint64_t size = argc >= 5 ? strtoull(argv[2], NULL, 10) : 0;
	int flags = argc >= 5 && !strcmp(argv[3], "shared") ? MAP_SHARED : MAP_PRIVATE;
	void *memory = MAP_FAILED;

	if (fd >= 0 && !ftruncate(fd, (off_t)size))
		memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		return 1;
	bool deferred = !strcmp(argv[4], "deferred");
	struct memslot slot = { .gpa = deferred ? 0 : GIB(4),
				.size = size,
				.hva = (uint64_t)memory,
				.state = SLOT_KEPT };

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
	if (deferred) /* the jump instruction of firmware that is in place; see firmware.c */
		((uint8_t *)memory)[0xffff0] = 1;
	if (deferred)
		pf_queue_undefer("the firmware has finished");
	printf("%s\n", pf_populate_names[pf_options.populate]);
	if (argc == 6 && !strcmp(argv[5], "crowd"))
		populate_crowded();
	else if (argc == 6)
		populate_late();
	if (argc == 7) {
		uint64_t bytes = populate_after(argv[5], strtoull(argv[6], NULL, 10));

		printf("%llu\n", (unsigned long long)bytes >> 20);
	}
	return 0;
}
