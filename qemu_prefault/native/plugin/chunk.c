// SPDX-License-Identifier: GPL-2.0-or-later
#include "chunk.h"

#include <errno.h>
#include <linux/kvm.h>

#include "common/prefault_loop.h"
#include "event_log.h"
#include "headroom.h"
#include "host_ranges.h"
#include "queue.h"

static int run_goes_on(void *context)
{
	const struct run_ctx *ctx = context;

	if (ctx->vcpu->run->immediate_exit || atomic_load(&pf_slot_changes))
		return 0;
	return !ctx->deadline || prefault_now_ns() < ctx->deadline;
}

/* Only the ioctl can fail to come back. */
static void note_start(void *context)
{
	const struct run_ctx *ctx = context;

	atomic_store(&ctx->vcpu->busy_since, ctx->in_ioctl ? prefault_now_ns() : 0);
}

static void run_range(struct prefault_range *range, struct run_ctx *ctx)
{
	const struct prefault_limits limits = { .chunk_bytes = CHUNK, .stuck_ns = STUCK_NS };
	const struct prefault_hooks hooks = { run_goes_on, note_start, ctx };

	ctx->in_ioctl = range->kind == PREFAULT_STAGE2;
	if (run_goes_on(ctx))
		prefault_run_range(range, ctx->vcpu->fd, &limits, &hooks);
	else
		range->error = PREFAULT_ABORTED;
}

/*
 * Bytes of the item that are done, *mapped those that were mapped, *error as the ioctl's. Of a
 * resident-only item what is absent counts as done.
 */
static uint64_t run_stage2(const struct work_item *item, struct run_ctx *ctx, uint64_t *mapped,
			   int *error)
{
	uint64_t at = 0;

	*mapped = 0;
	*error = 0;
	while (at < item->size && !*error) {
		uint64_t start = item->hva + at, length = item->size - at;

		if (item->resident) {
			pthread_mutex_lock(&pf_lock);
			bool found =
				pf_ranges_next_resident(&start, item->hva + item->size, &length);
			pthread_mutex_unlock(&pf_lock);
			if (!found)
				return item->size;
		}
		struct prefault_range range = { .start = item->gpa + (start - item->hva),
						.size = length,
						.kind = PREFAULT_STAGE2 };

		run_range(&range, ctx);
		at = start - item->hva + range.done;
		*mapped += range.done;
		*error = range.error;
	}
	return at;
}

void pf_chunk_run(struct work_item item, struct run_ctx *ctx)
{
	struct vcpu *self = ctx->vcpu;
	struct prefault_range populate = { .start = item.hva,
					   .size = item.size,
					   .kind = PREFAULT_POPULATE };
	uint64_t started = prefault_now_ns(), populated_at, ended, mapped = 0, done = 0;
	int error = 0;
	bool no_memory = item.populate && pf_guest_entered &&
			 !(pf_ranges_facts(item.hva, item.size) & MEMORY_HUGETLB) &&
			 pf_headroom() < 4 * CHUNK;

	pf_in_flight++;
	atomic_fetch_add(&pf_vcpus_working, 1);
	self->in_progress = item;
	pthread_mutex_unlock(&pf_lock);
	if (item.populate) {
		if (no_memory)
			populate.error = ENOMEM;
		else
			run_range(&populate, ctx);
		item.size = populate.done; /* the rest is put back as it was */
	}
	populated_at = prefault_now_ns();
	if (item.stage2 && item.size)
		done = run_stage2(&item, ctx, &mapped, &error);
	ended = prefault_now_ns();
	atomic_store(&self->busy_since, 0);
	pthread_mutex_lock(&pf_lock);
	self->in_progress.size = 0;
	atomic_fetch_sub(&pf_vcpus_working, 1);
	pf_leave_ioctl();

	struct memslot *slot = pf_find_memslot(item.slot);
	uint64_t from, length;
	bool again = mapped &&
		     !pf_ranges_unmarked(MEMORY_PREFAULTED, item.hva, done, &from, &length);

	pf_ranges_set_mark(MEMORY_PREFAULTED, item.hva, done);
	ctx->populated += populate.done;
	ctx->prefaulted += mapped;
	ctx->again |= again;
	pf_counters.populated += populate.done;
	pf_counters.populate_ns += populated_at - started;
	pf_counters.prefaulted += mapped;
	pf_counters.prefault_ns += ended - populated_at;
	if (again) {
		pf_counters.again += mapped;
		pf_counters.again_ns += ended - populated_at;
	}
	if (slot)
		slot->prefaulted += mapped;
	if (item.populate) {
		struct work_item rest = item;

		pf_ranges_set_mark(MEMORY_POPULATED, item.hva, populate.done);
		rest.size = populate.size;
		if (populate.error == PREFAULT_ABORTED) {
			pf_queue_put_back(rest, populate.done);
		} else if (populate.error) {
			pf_counters.errors++;
			pf_log_event("error", "populate",
				     ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu", populate.error,
				     (unsigned long long)(item.gpa + populate.done),
				     (unsigned long long)(rest.size - populate.done));
			if (slot) /* what is there is prefaulted all the same */
				pf_queue_make_resident_only(slot);
		}
		item.populate = false;
	}
	if (!item.stage2 || done >= item.size)
		return;
	if (error == PREFAULT_ABORTED || error == PREFAULT_STUCK || error == EOPNOTSUPP) {
		pf_queue_put_back(item, done);
		if (error == PREFAULT_ABORTED && (done || ended - populated_at < STUCK_NS))
			return;
		/* The vCPU is the matter: let it go through the guest, or let others do it. */
		self->stuck = true;
		self->retry_at = ended + QUIET_NS;
		pf_counters.stuck++;
		pf_log_event("stuck", error == EOPNOTSUPP ? "guest mode" : "no progress",
			     ",\"vcpu\":%lu", self->id);
	} else if (error) {
		pf_counters.errors++;
		if (slot && (error == EFAULT || error == ENOENT)) {
			pf_queue_drop_memslot(slot->id); /* no RAM after all */
			slot->state = SLOT_SKIPPED;
			slot->why = "not prefaultable";
			pf_queue_update();
		}
		pf_log_event("error", "prefault", ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu", error,
			     (unsigned long long)(item.gpa + done),
			     (unsigned long long)(item.size - done));
	}
}
