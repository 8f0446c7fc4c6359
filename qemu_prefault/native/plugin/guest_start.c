// SPDX-License-Identifier: GPL-2.0-or-later
#include "guest_start.h"

#include "claims.h"
#include "common/prefault_loop.h"
#include "event_log.h"
#include "memslots.h"
#include "options.h"
#include "prefault_vcpu.h"
#include "queue.h"
#include "quirk.h"
#include "state.h"

void pf_guest_start(void)
{
	pf_guest_started = true;
	if (pf_options.keep && pf_capable)
		pf_quirk_decide();
	pf_prefault_vcpus_create();
	pf_memslots_classify_again();
	/* Queue all slots again, because facts about their mappings may have changed meanwhile. */
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
	if (pf_options.keep && pf_capable)
		pf_claims_check();
	pf_slot_changed_at = prefault_now_ns();
	pf_queue_update();
	pf_log_event("first-run", NULL, ",\"bytes\":%llu",
		     (unsigned long long)pf_queue_pending_bytes());
}
