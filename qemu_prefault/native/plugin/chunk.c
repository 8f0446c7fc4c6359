// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "chunk.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "claims.h"
#include "common/prefault_loop.h"
#include "event_log.h"
#include "headroom.h"
#include "host_ranges.h"
#include "queue.h"

/* All chunks since the last report. */
static struct {
	uint64_t populated, prefaulted; /* bytes */
	uint64_t ns;			/* sum over all threads */
	bool again;
} unreported;

void pf_chunk_report(bool started)
{
	if (unreported.populated || unreported.prefaulted)
		pf_log_event("prefaulted",
			     !started	      ? "before the first instruction" :
			     unreported.again ? "the tables were dropped" :
						"new memory",
			     ",\"bytes\":%llu,\"populated\":%llu,\"seconds\":%.6f,\"pending\":%llu",
			     (unsigned long long)unreported.prefaulted,
			     (unsigned long long)unreported.populated, (double)unreported.ns / 1e9,
			     (unsigned long long)pf_queue_pending_bytes());
	memset(&unreported, 0, sizeof(unreported));
}

/*
 * The check of the sources may take longer than a slice, so the first step does not depend on the
 * deadline. Otherwise the work would never end.
 */
static int run_goes_on(void *context)
{
	const struct run_ctx *ctx = context;

	if (ctx->vcpu->run->immediate_exit || atomic_load(&pf_slot_changes))
		return 0;
	return !ctx->deadline || !ctx->steps || prefault_now_ns() < ctx->deadline;
}

/* Set the start time that the watchdog checks. Only the ioctl can get stuck. */
static void note_start(void *context)
{
	struct run_ctx *ctx = context;

	ctx->steps++;
	atomic_store(&ctx->vcpu->busy_since, ctx->in_ioctl ? prefault_now_ns() : 0);
}

static void run_range(struct prefault_range *range, struct run_ctx *ctx)
{
	const struct prefault_limits limits = { .chunk_bytes = ctx->chunk_bytes,
						.stuck_ns = STUCK_NS };
	const struct prefault_hooks hooks = { run_goes_on, note_start, ctx };

	ctx->in_ioctl = range->kind == PREFAULT_STAGE2;
	if (run_goes_on(ctx))
		prefault_run_range(range, ctx->vcpu->fd, &limits, &hooks);
	else
		range->error = PREFAULT_ABORTED;
}

/* Return whether one bad page can make the system call for its whole range fail with this error. */
static bool is_page_error(int error)
{
	return error == EHWPOISON || error == EFAULT;
}

/*
 * Populate the rest of a range after a page error: halve the part that fails until it is one page,
 * and skip that page. Returns the bytes skipped.
 */
static uint64_t populate_around(struct prefault_range *range, struct run_ctx *ctx,
				uint64_t page_size)
{
	uint64_t step = range->size - range->done, skipped = 0;

	while (range->done < range->size && (!range->error || is_page_error(range->error))) {
		uint64_t left = range->size - range->done;
		struct prefault_range part = { .start = range->start + range->done,
					       .size = step < left ? step : left,
					       .kind = PREFAULT_POPULATE };

		run_range(&part, ctx);
		range->done += part.done;
		range->error = part.error;
		if (!is_page_error(part.error))
			continue;
		if (part.size > page_size) {
			step = (part.size / 2 + page_size - 1) / page_size * page_size;
			continue;
		}
		range->done += part.size;
		skipped += part.size;
		step = left;
	}
	if (range->done == range->size)
		range->error = 0;
	return skipped;
}

/*
 * Map the item in stage 2. Returns the completed bytes. Sets *mapped to the mapped bytes, and
 * *error to the ioctl's errno. Absent pages of a resident-only item count as completed.
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

/* The progress of a chunk. Times are CLOCK_MONOTONIC in nanoseconds. */
struct progress {
	uint64_t started, populated_at, ended;
	uint64_t populated;    /* bytes */
	uint64_t skipped;      /* bytes of pages that cannot be populated */
	uint64_t mapped, done; /* bytes; see run_stage2() */
	int error;	       /* errno of the ioctl */
};

/* Call this function, end_populate() and end_stage2() with pf_lock held. */
static void count_progress(const struct work_item *item, const struct progress *progress,
			   struct memslot *slot)
{
	uint64_t from, length;
	bool smm = item->slot >> 16; /* SMM has its own tables of the same memory */
	bool again =
		progress->mapped && !smm &&
		!pf_ranges_unmarked(MEMORY_PREFAULTED, item->hva, progress->done, &from, &length);

	if (!smm)
		pf_ranges_set_mark(MEMORY_PREFAULTED, item->hva, progress->done);
	unreported.populated += progress->populated;
	unreported.prefaulted += progress->mapped;
	unreported.ns += progress->ended - progress->started;
	unreported.again |= again;
	pf_counters.populated += progress->populated;
	pf_counters.populate_ns += progress->populated_at - progress->started;
	pf_counters.prefaulted += progress->mapped;
	pf_counters.prefault_ns += progress->ended - progress->populated_at;
	if (again) {
		pf_counters.again += progress->mapped;
		pf_counters.again_ns += progress->ended - progress->populated_at;
	}
	if (slot)
		slot->prefaulted += progress->mapped;
}

static void end_populate(const struct work_item *item, const struct prefault_range *populate,
			 struct memslot *slot)
{
	struct work_item rest = *item;

	pf_ranges_set_mark(MEMORY_POPULATED, item->hva, populate->done);
	rest.size = populate->size;
	if (populate->error == PREFAULT_ABORTED) {
		pf_queue_put_back(rest, populate->done);
	} else if (populate->error) {
		pf_counters.errors++;
		pf_log_event("error", "populate", ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu",
			     populate->error, (unsigned long long)(item->gpa + populate->done),
			     (unsigned long long)(rest.size - populate->done));
		if (slot) /* prefault only the pages that are present */
			pf_queue_make_resident_only(slot);
	}
}

static void end_stage2(const struct work_item *item, struct vcpu *self,
		       const struct progress *progress, struct memslot *slot)
{
	uint64_t done = progress->done;
	int error = progress->error;

	if (error == PREFAULT_ABORTED || error == PREFAULT_STUCK || error == EOPNOTSUPP) {
		pf_queue_put_back(*item, done);
		if (error == PREFAULT_ABORTED &&
		    (done || progress->ended - progress->populated_at < STUCK_NS))
			return;
		/* The vCPU is stuck. Skip it until it has entered the guest. */
		self->stuck = true;
		self->retry_at = progress->ended + QUIET_NS;
		pf_counters.stuck++;
		pf_log_event("stuck", error == EOPNOTSUPP ? "guest mode" : "no progress",
			     ",\"vcpu\":%lu", self->id);
	} else if (error) {
		pf_counters.errors++;
		if (slot && (error == EFAULT || error == ENOENT)) {
			pf_queue_drop_memslot(slot->id); /* not RAM */
			slot->state = SLOT_SKIPPED;
			slot->why = "not prefaultable";
			pf_queue_update();
		}
		pf_log_event("error", "prefault", ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu", error,
			     (unsigned long long)(item->gpa + done),
			     (unsigned long long)(item->size - done));
	}
}

/* Return whether all pages are allocated, in QEMU's mapping or in the shared file. */
static bool is_allocated(const struct work_item *item)
{
	unsigned char resident[CHUNK / 4096];

	if (pf_ranges_present(item->hva, item->size) == item->size)
		return true;
	if (pf_ranges_facts(item->hva, item->size) & MEMORY_PRIVATE || item->size > CHUNK ||
	    syscall(SYS_mincore, item->hva, item->size, resident))
		return false;
	for (uint64_t page = 0; page < item->size / 4096; page++)
		if (!(resident[page] & 1))
			return false;
	return true;
}

/*
 * Return whether the sources of a chunk still have enough memory. Other users may have allocated
 * memory since the last check. If a source has too little, check whether the pages exist already.
 */
static bool has_memory(const struct work_item *item)
{
	struct memory_source sources[SOURCE_KINDS];

	for (size_t n = pf_headroom_sources(item->hva, item->size, sources); n; n--) {
		const struct memory_source *source = &sources[n - 1];
		uint64_t bytes = item->size > source->page_size ? item->size : source->page_size;
		uint64_t of_file = bytes < source->file_bytes ? bytes : source->file_bytes;
		uint64_t need = bytes * source->cost + of_file;
		uint64_t reserve = RESERVE * (source->cost + (of_file != 0));
		uint64_t unallocated = pf_headroom_unallocated(source);
		uint64_t ours = source->reserved ? UINT64_MAX : 0;

		if (need > unallocated)
			need = unallocated;
		if (pf_headroom_left(source, ours, reserve) < need && !is_allocated(item))
			return false;
	}
	return true;
}

uint64_t pf_chunk_run(struct work_item item, struct run_ctx *ctx)
{
	struct vcpu *self = ctx->vcpu;
	struct prefault_range populate = { .start = item.hva,
					   .size = item.size,
					   .kind = PREFAULT_POPULATE };
	struct progress progress = { .started = prefault_now_ns() };

	if (item.populate)
		pf_claims_check_again();
	pf_populating += item.populate;
	pf_in_flight++;
	atomic_fetch_add(&pf_vcpus_working, 1);
	self->in_progress = item;
	pthread_mutex_unlock(&pf_lock);
	if (item.populate) {
		if (!has_memory(&item))
			populate.error = ENOMEM;
		else
			run_range(&populate, ctx);
		/* A full file system or huge page pool also causes EFAULT. */
		if (is_page_error(populate.error) && has_memory(&item)) {
			uint64_t huge = pf_ranges_huge_page_size(item.hva, item.size);

			progress.skipped = populate_around(&populate, ctx, huge ? huge : 4096);
			item.resident |= progress.skipped != 0;
		}
		item.size = populate.done; /* end_populate() puts the rest back */
	}
	progress.populated = populate.done - progress.skipped;
	progress.populated_at = prefault_now_ns();
	if (item.stage2 && item.size)
		progress.done = run_stage2(&item, ctx, &progress.mapped, &progress.error);
	progress.ended = prefault_now_ns();
	atomic_store(&self->busy_since, 0);
	pthread_mutex_lock(&pf_lock);
	pf_populating -= item.populate;
	self->in_progress.size = 0;
	atomic_fetch_sub(&pf_vcpus_working, 1);
	pf_leave_ioctl();

	struct memslot *slot = pf_find_memslot(item.slot);

	count_progress(&item, &progress, slot);
	if (progress.skipped) {
		pf_counters.errors++;
		pf_log_event("error", "populate: pages skipped", ",\"gpa\":%llu,\"size\":%llu",
			     (unsigned long long)item.gpa, (unsigned long long)progress.skipped);
	}
	if (item.populate) {
		end_populate(&item, &populate, slot);
		item.populate = false;
	}
	if (item.stage2 && progress.done < item.size)
		end_stage2(&item, self, &progress, slot);
	return item.stage2 ? progress.done : item.size;
}
