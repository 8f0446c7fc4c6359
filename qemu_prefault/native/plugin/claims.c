// SPDX-License-Identifier: GPL-2.0-or-later
#include "claims.h"

#include <stdbool.h>
#include <stdint.h>

#include "event_log.h"
#include "headroom.h"
#include "host_ranges.h"
#include "messages.h"
#include "options.h"
#include "queue.h"
#include "state.h"

/* The memory to populate from one source. */
struct claim {
	struct memory_source source;
	uint64_t wanted;		   /* bytes to populate */
	uint64_t reserved;		   /* bytes of wanted that are reserved for this guest */
	uint64_t first_left, first_wanted; /* at the first check */
	uint64_t others;		   /* see others_will_take() */
};

static struct claim *claims;
static size_t claim_count, claim_capacity;
static uint64_t claims_next; /* pf_counters.populated at which the claims are checked again */

static void add_claim(const struct memory_source *source, uint64_t absent)
{
	size_t at = 0;

	while (at < claim_count && !pf_headroom_same(&claims[at].source, source))
		at++;
	if (at == claim_count) {
		if (!pf_grow((void **)&claims, &claim_capacity, claim_count, sizeof(*claims)))
			return; /* out of memory: chunk.c checks each chunk again */
		claims[claim_count++] = (struct claim){ .source = *source };
	}
	claims[at].wanted += absent * source->cost;
	claims[at].reserved += source->reserved ? absent : 0;
}

static void print_short(const struct claim *claim, uint64_t left)
{
	static const char *const names[SOURCE_KINDS] = {
		[SOURCE_HOST] = "host or the cgroup",
		[SOURCE_COMMIT] = "limit on committed memory (vm.overcommit_memory=2)",
		[SOURCE_NODES] = "set of NUMA nodes that guest memory is bound to",
		[SOURCE_POOL] = "pool or the cgroup",
		[SOURCE_FILE_SYSTEM] = "file system",
	};
	unsigned long long mib = claim->wanted >> 20;
	const char *of = claim->source.page_size ? " of huge pages" : "";
	bool hidden = !pf_headroom_visible(&claim->source) && pf_options.populate != POPULATE_ALL;

	if (hidden && claim->source.kind == SOURCE_FILE_SYSTEM)
		pf_print_error("qemu-prefault: populating needs %llu MiB of a file system that "
			       "contains files that QEMU cannot find, so only present pages are "
			       "prefaulted. Set populate=all if the file system is large enough\n",
			       mib);
	else if (hidden)
		pf_print_error("qemu-prefault: populating needs %llu MiB%s, but the limits of some "
			       "of QEMU's cgroups cannot be read (a cgroup namespace, or a missing "
			       "AppArmor rule), so only present pages are prefaulted. Set "
			       "populate=all if the limits are high enough\n",
			       mib, of);
	else if (claim->others)
		pf_print_error("qemu-prefault: populating needs %llu MiB%s, and other processes "
			       "will allocate about %llu MiB meanwhile, but the %s has only %llu "
			       "MiB, so only present pages are prefaulted. Start fewer guests at "
			       "once\n",
			       mib, of, (unsigned long long)claim->others >> 20,
			       names[claim->source.kind], (unsigned long long)left >> 20);
	else
		pf_print_error("qemu-prefault: populating needs %llu MiB%s, but the %s has only "
			       "%llu MiB, so only present pages are prefaulted. Free memory or "
			       "raise the limit\n",
			       mib, of, names[claim->source.kind], (unsigned long long)left >> 20);
}

static void populate_no_more(uint64_t wanted)
{
	pf_log_event("held", "not enough free memory to populate", ",\"bytes\":%llu",
		     (unsigned long long)wanted);
	pf_options.populate = POPULATE_RESIDENT;
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_make_resident_only(&pf_memslots[i]);
}

/* Add the pages of a file that QEMU copies to the memory that the claims need. */
static void add_copied(const struct claim *file)
{
	for (size_t i = 0; i < claim_count; i++) {
		enum source_kind kind = claims[i].source.kind;

		if (kind == SOURCE_HOST || kind == SOURCE_NODES || kind == SOURCE_COMMIT)
			claims[i].wanted += file->wanted;
	}
}

/*
 * Limit each file's claim to the bytes without a block, and add up the claims on files in one file
 * system.
 */
static void merge_files(void)
{
	for (size_t i = 0; i < claim_count; i++) {
		uint64_t unallocated = pf_headroom_unallocated(&claims[i].source);

		if (claims[i].wanted > unallocated)
			claims[i].wanted = unallocated;
		if (claims[i].source.copied)
			add_copied(&claims[i]);
	}
	for (size_t i = 0; i < claim_count; i++)
		for (size_t j = 0; j < i; j++)
			if (claims[i].source.kind == SOURCE_FILE_SYSTEM &&
			    claims[j].source.kind == SOURCE_FILE_SYSTEM &&
			    claims[i].source.device == claims[j].source.device) {
				claims[i].wanted += claims[j].wanted;
				claims[j].wanted = 0;
			}
}

/*
 * Return the bytes that other processes will allocate until this guest is populated, if they
 * continue at their rate since the first check.
 */
static uint64_t others_will_take(const struct claim *claim, uint64_t left)
{
	uint64_t ours = claim->first_wanted - claim->wanted;
	uint64_t gone = claim->first_left > left ? claim->first_left - left : 0;

	if (claim->first_wanted <= claim->wanted || gone <= ours)
		return 0;
	return (uint64_t)((double)claim->wanted * (double)(gone - ours) / (double)ours);
}

void pf_claims_check(void)
{
	for (size_t i = 0; i < claim_count; i++)
		claims[i].wanted = claims[i].reserved = 0;
	claims_next = UINT64_MAX / 2;
	for (size_t i = 0; i < pf_queue_length; i++) {
		const struct work_item *item = &pf_queue[i];
		struct memory_source sources[SOURCE_KINDS];
		uint64_t absent;

		if (!item->populate)
			continue;
		absent = item->size - pf_ranges_present(item->hva, item->size);
		for (size_t n = pf_headroom_sources(item->hva, item->size, sources); n; n--)
			add_claim(&sources[n - 1], absent);
	}
	merge_files();
	for (size_t i = 0; i < claim_count; i++) {
		struct claim *claim = &claims[i];
		/* MemAvailable and cgroup limits already include a margin. */
		uint64_t reserve = claim->source.kind == SOURCE_HOST ? 0 : RESERVE;
		uint64_t left = pf_headroom_left(&claim->source, claim->reserved, reserve);

		if (!claim->first_wanted) {
			claim->first_wanted = claim->wanted;
			claim->first_left = left;
		}
		claim->others = others_will_take(claim, left);
		if (claim->wanted > left || claim->others > left - claim->wanted) {
			print_short(claim, left);
			populate_no_more(claim->wanted);
			return;
		}
		/* As Limit.per_batch in host/headroom.py. */
		if (claim->wanted && left / 16 < claims_next)
			claims_next = left / 16;
	}
	claims_next += pf_counters.populated;
}

void pf_claims_check_again(void)
{
	if (pf_counters.populated >= claims_next)
		pf_claims_check();
}
