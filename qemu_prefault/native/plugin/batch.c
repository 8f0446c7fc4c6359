// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/prefault_loop.h"
#include "host_ranges.h"
#include "prefault_vcpu.h"
#include "state.h"

/* One thread's part of a batch, and the vCPU that the thread uses: a prefault vCPU, or a stopped one. */
struct batch_worker {
	struct vcpu *vcpu;
	struct worker_ranges assigned;
	pthread_t thread;
	pid_t tid;
	bool borrowed; /* the vCPU is the guest's */
	bool in_flight, in_stage2;
};

static struct {
	struct batch_worker *workers;
	size_t count, running;
	uint64_t chunk_bytes, started, ended;
	atomic_bool abort;
} batch;

bool pf_batch_running(void)
{
	return batch.running;
}

/* Interrupt workers that are stuck in the ioctl. */
void pf_batch_kick(void)
{
	for (size_t i = 0; batch.running && i < batch.count; i++)
		pf_kick_thread(batch.workers[i].tid);
}

void pf_batch_lend_vcpus(void)
{
	pthread_mutex_lock(&pf_lock);
	for (size_t i = 0; i < pf_vcpu_count; i++)
		atomic_store(&pf_vcpus[i].lent, !atomic_load(&pf_vcpus[i].in_guest));
	pthread_mutex_unlock(&pf_lock);
}

/* Call with pf_lock held. */
static void leave_ioctl(struct batch_worker *worker)
{
	if (!worker->in_flight)
		return;
	worker->in_flight = false;
	if (worker->borrowed)
		worker->vcpu->in_use = false;
	pf_leave_ioctl();
}

/* Call with pf_lock held. */
static bool may_use(const struct batch_worker *worker)
{
	return !pf_logs_to_ring() && (!worker->borrowed || atomic_load(&worker->vcpu->lent));
}

/* Called before each chunk. Waits while QEMU changes a memslot. */
static int batch_goes_on(void *context)
{
	struct batch_worker *worker = context;
	bool go_on;

	pthread_mutex_lock(&pf_lock);
	leave_ioctl(worker);
	while (atomic_load(&pf_slot_changes))
		pthread_cond_wait(&pf_changed, &pf_lock);
	go_on = !atomic_load(&batch.abort) && !(worker->in_stage2 && !may_use(worker));
	if (go_on) {
		worker->in_flight = true;
		if (worker->borrowed)
			worker->vcpu->in_use = worker->in_stage2;
		else
			pf_prefault_vcpu_renew_root(worker->vcpu, false);
		pf_in_flight++;
	}
	pthread_mutex_unlock(&pf_lock);
	return go_on;
}

static void *run_worker(void *context)
{
	struct batch_worker *worker = context;
	struct vcpu *vcpu = worker->vcpu;
	struct prefault_limits limits = { .stuck_ns = STUCK_NS };
	const struct prefault_hooks hooks = { batch_goes_on, NULL, worker };
	uint64_t mapped = 0, populated = 0;
	bool stuck = false;

	pthread_mutex_lock(&pf_lock);
	worker->tid = (pid_t)syscall(SYS_gettid);
	pthread_mutex_unlock(&pf_lock);
	for (size_t i = 0; i < worker->assigned.count; i++) {
		struct prefault_range *range = &worker->assigned.ranges[i];

		/*
		 * Do not check pf_vcpu_can_prefault(). Try the ioctl even if the root may be
		 * obsolete. When QEMU loads a snapshot, it sets the registers after KVM has dropped
		 * the tables, and KVM then uses a new root.
		 */
		if (range->kind == PREFAULT_STAGE2 && stuck) {
			range->error = PREFAULT_STUCK;
			continue;
		}
		worker->in_stage2 = range->kind == PREFAULT_STAGE2;
		limits.chunk_bytes = batch.chunk_bytes;
		if (!worker->borrowed && worker->in_stage2 && limits.chunk_bytes > RUNNING_CHUNK)
			limits.chunk_bytes = RUNNING_CHUNK;
		prefault_run_range(range, vcpu->fd, &limits, &hooks);
		stuck |= range->error == PREFAULT_STUCK;
		if (range->error == PREFAULT_ABORTED && !atomic_load(&batch.abort))
			range->error = EBUSY;
		*(range->kind == PREFAULT_STAGE2 ? &mapped : &populated) += range->done;
		if (range->kind == PREFAULT_POPULATE) {
			pthread_mutex_lock(&pf_lock);
			pf_ranges_set_mark(MEMORY_POPULATED, range->start, range->done);
			pthread_mutex_unlock(&pf_lock);
		}
	}
	pthread_mutex_lock(&pf_lock);
	leave_ioctl(worker);
	if (mapped && vcpu->no_root_yet) {
		vcpu->no_root_yet = false;
		vcpu->seen_generation = atomic_load(&pf_root_generation);
	}
	pf_counters.prefaulted += mapped;
	pf_counters.populated += populated;
	if (!--batch.running)
		batch.ended = prefault_now_ns();
	pthread_cond_broadcast(&pf_changed);
	pthread_mutex_unlock(&pf_lock);
	return NULL;
}

size_t pf_batch_worker_count(void)
{
	return pf_vcpu_count;
}

static void change_worker_count(int change)
{
	pthread_mutex_lock(&pf_lock);
	batch.count += (size_t)change;
	batch.running += (size_t)change;
	pthread_cond_broadcast(&pf_changed);
	pthread_mutex_unlock(&pf_lock);
}

enum request_error pf_batch_start(struct worker_ranges *assigned, size_t count,
				  uint64_t chunk_bytes)
{
	struct batch_worker *workers = calloc(count, sizeof(*workers));
	enum request_error problem = REQUEST_OK;
	sigset_t mask, before;

	if (!workers)
		return REQUEST_NO_MEMORY;

	sigfillset(&mask);
	/* pf_kick_thread() sends SIGUSR1. QEMU's handler does nothing in threads without a vCPU. */
	sigdelset(&mask, SIGUSR1);
	pthread_mutex_lock(&pf_lock);
	if (batch.workers) {
		pthread_mutex_unlock(&pf_lock);
		free(workers);
		return REQUEST_BUSY;
	}
	batch.workers = workers;
	batch.count = batch.running = 0;
	batch.chunk_bytes = chunk_bytes;
	batch.started = prefault_now_ns();
	atomic_store(&batch.abort, false);
	pthread_mutex_unlock(&pf_lock);
	pthread_sigmask(SIG_SETMASK, &mask, &before);
	for (size_t i = 0; i < count; i++) {
		struct batch_worker *worker = &workers[batch.count];

		if (!assigned[i].count)
			continue;
		worker->vcpu = pf_prefault_vcpu(0) ? pf_prefault_vcpu(0) : &pf_vcpus[i];
		worker->borrowed = worker->vcpu == &pf_vcpus[i];
		worker->assigned = assigned[i];
		change_worker_count(1);
		/* pthread_create() allocates, so do not hold pf_lock. */
		if (pthread_create(&worker->thread, NULL, run_worker, worker)) {
			change_worker_count(-1);
			problem = REQUEST_NO_THREAD;
			atomic_store(&batch.abort, true);
			break;
		}
		pthread_setname_np(worker->thread, "prefault-batch");
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (problem)
		pf_batch_end();
	return problem;
}

bool pf_batch_done(uint64_t *bytes, double *seconds)
{
	pthread_mutex_lock(&pf_lock);
	bool done = !batch.running;

	*bytes = 0;
	for (size_t i = 0; i < batch.count; i++)
		for (size_t j = 0; j < batch.workers[i].assigned.count; j++)
			*bytes += __atomic_load_n(&batch.workers[i].assigned.ranges[j].done,
						  __ATOMIC_RELAXED);
	*seconds =
		(double)((done && batch.count ? batch.ended : prefault_now_ns()) - batch.started) /
		1e9;
	pthread_mutex_unlock(&pf_lock);
	return done;
}

void pf_batch_abort(void)
{
	atomic_store(&batch.abort, true);
}

void pf_batch_end(void)
{
	for (size_t i = 0; i < batch.count; i++)
		pthread_join(batch.workers[i].thread, NULL);
	pthread_mutex_lock(&pf_lock);
	struct batch_worker *workers = batch.workers;

	batch.workers = NULL;
	batch.count = 0;
	pthread_mutex_unlock(&pf_lock);
	free(workers);
}
