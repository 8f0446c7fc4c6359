// SPDX-License-Identifier: GPL-2.0-or-later
#include "guest_start.h"

#include "common/prefault_loop.h"
#include "event_log.h"
#include "headroom.h"
#include "host_ranges.h"
#include "options.h"
#include "queue.h"
#include "quirk.h"
#include "state.h"

enum { HUGE_SIZES = 4 }; /* different ones that a guest may have */

struct huge_pages {
	uint64_t page_size, wanted;
};

static void count_huge(struct huge_pages *sizes, const struct work_item *item)
{
	uint64_t page_size = pf_ranges_huge_page_size(item->hva, item->size);

	for (int i = 0; page_size && i < HUGE_SIZES; i++) {
		if (sizes[i].page_size && sizes[i].page_size != page_size)
			continue;
		sizes[i].page_size = page_size;
		sizes[i].wanted += item->size - pf_ranges_present(item->hva, item->size);
		return;
	}
}

static void populate_no_more(uint64_t wanted, uint64_t left, const char *of, const char *where)
{
	pf_print_error(
		"qemu-prefault: populating needs %llu MiB%s, the %s or the cgroup has %llu MiB: "
		"only present pages are prefaulted\n",
		(unsigned long long)wanted >> 20, of, where, (unsigned long long)left >> 20);
	pf_log_event("held", "no memory to populate", ",\"bytes\":%llu",
		     (unsigned long long)wanted);
	pf_options.populate = POPULATE_RESIDENT;
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
}

/* Populating is spending: if the host cannot give that much, prefault what is there. */
static void check_headroom(void)
{
	uint64_t wanted = 0, left = pf_headroom();
	struct huge_pages huge[HUGE_SIZES] = { 0 };

	for (size_t i = 0; i < pf_queue_length; i++) {
		const struct work_item *item = &pf_queue[i];

		if (!item->populate)
			continue;
		if (pf_ranges_facts(item->hva, item->size) & MEMORY_HUGETLB)
			count_huge(huge, item);
		else
			wanted += item->size - pf_ranges_present(item->hva, item->size);
	}
	if (wanted > left) {
		populate_no_more(wanted, left, "", "host");
		return;
	}
	for (int i = 0; i < HUGE_SIZES && huge[i].page_size; i++) {
		left = pf_headroom_huge(huge[i].page_size);
		if (huge[i].wanted > left) {
			populate_no_more(huge[i].wanted, left, " of huge pages", "pool");
			return;
		}
	}
}

void pf_guest_start(void)
{
	pf_guest_started = true;
	if (pf_options.keep && pf_capable)
		pf_quirk_decide();
	for (size_t i = 0; i < pf_memslot_count; i++) /* facts may have come after the slots */
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
	if (pf_options.keep && pf_capable)
		check_headroom();
	pf_slot_changed_at = prefault_now_ns();
	pf_queue_update();
	pf_log_event("first-run", NULL, ",\"bytes\":%llu",
		     (unsigned long long)pf_queue_pending_bytes());
}
