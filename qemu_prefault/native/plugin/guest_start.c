// SPDX-License-Identifier: GPL-2.0-or-later
#include "guest_start.h"

#include <stdio.h>

#include "common/prefault_loop.h"
#include "event_log.h"
#include "headroom.h"
#include "host_ranges.h"
#include "options.h"
#include "queue.h"
#include "quirk.h"
#include "state.h"

/* Populating is spending: if the host cannot give that much, prefault what is there. */
static void check_headroom(void)
{
	uint64_t wanted = 0, left = pf_headroom();

	for (size_t i = 0; i < pf_queue_length; i++) {
		const struct work_item *item = &pf_queue[i];

		if (!item->populate || (pf_ranges_facts(item->hva, item->size) & MEMORY_HUGETLB))
			continue;
		wanted += item->size - pf_ranges_present(item->hva, item->size);
	}
	if (wanted <= left)
		return;
	fprintf(stderr,
		"qemu-prefault: populating needs %llu MiB, the host or the cgroup has %llu MiB: "
		"only present pages are prefaulted\n",
		(unsigned long long)wanted >> 20, (unsigned long long)left >> 20);
	pf_log_event("held", "no memory to populate", ",\"bytes\":%llu", (unsigned long long)wanted);
	pf_options.populate = POPULATE_RESIDENT;
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
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
	pf_log_event("first-run", NULL, ",\"bytes\":%llu", (unsigned long long)pf_queue_pending_bytes());
}
