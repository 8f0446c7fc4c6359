// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "batch.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/prefault_loop.h"
#include "host_ranges.h"
#include "pace.h"
#include "prefault_vcpu.h"
#include "state.h"

/* One part of a batch, and the vCPU that its thread uses: a prefault vCPU, or a stopped one. */
struct batch_worker {
	struct vcpu *vcpu;
	struct worker_ranges assigned;
	pthread_t thread; /* of the entry's number, which may process other entries */
	pid_t tid;	  /* of the thread that processes this entry */
	bool borrowed;	  /* the vCPU is the guest's */
	struct pace pace;
	bool in_flight, in_stage2;
};

static struct {
	struct batch_worker *workers;
	size_t count, running, threads;
	atomic_size_t next; /* the first worker that no thread has taken */
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

static bool guest_runs(void)
{
	for (size_t i = 0; i < pf_vcpu_count; i++)
		if (atomic_load(&pf_vcpus[i].in_guest))
			return true;
	return false;
}

/* Wait until the guest has had its part of the CPU time. Call with pf_lock held. */
static void rest(uint64_t until)
{
	uint64_t now;

	while (guest_runs() && !atomic_load(&batch.abort) && (now = prefault_now_ns()) < until) {
		struct timespec deadline = pf_deadline_in(until - now);

		pthread_cond_timedwait(&pf_changed, &pf_lock, &deadline);
	}
}

/* Called before each chunk. Waits while QEMU changes a memslot. */
static int batch_goes_on(void *context)
{
	struct batch_worker *worker = context;
	bool go_on;

	pthread_mutex_lock(&pf_lock);
	leave_ioctl(worker);
	if (worker->pace.began)
		rest(pf_pace_end(&worker->pace));
	while (atomic_load(&pf_slot_changes))
		pthread_cond_wait(&pf_changed, &pf_lock);
	pf_pace_begin(&worker->pace, !guest_runs());
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

static void run_worker(struct batch_worker *worker)
{
	struct vcpu *vcpu = worker->vcpu;
	struct prefault_limits limits = { .stuck_ns = STUCK_NS };
	const struct prefault_hooks hooks = { batch_goes_on, NULL, worker };
	uint64_t mapped = 0, populated = 0;
	bool stuck = false;

	pf_pace_start(&worker->pace);
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
}

/* Process workers until none is left. If QEMU's limits allow few threads, each does several. */
static void *run_workers(void *unused)
{
	size_t number;

	(void)unused;
	while ((number = atomic_fetch_add(&batch.next, 1)) < batch.count)
		run_worker(&batch.workers[number]);
	return NULL;
}

size_t pf_batch_worker_count(void)
{
	return pf_vcpu_count;
}

/*
 * Return how many threads QEMU's limits allow, at most `wanted`. If the result is 0, store a clause
 * about the limit.
 */
static size_t allowed_threads(size_t wanted, char clause[PF_CLAUSE])
{
	for (; wanted; wanted /= 2) {
		const struct limits_need need = {
			.tasks = (uint32_t)wanted,
			.mappings = 2 * (uint32_t)wanted,
			.bytes = wanted * PF_STACK,
			.reserve = wanted > 1 ? LIMITS_RESERVE : LIMITS_RESERVE_REQUEST,
		};

		if (pf_limits_allow(&need, clause))
			break;
	}
	return wanted;
}

/* Start a batch with these workers. Returns false if another batch is running. */
static bool begin(struct batch_worker *workers, size_t count, uint64_t chunk_bytes)
{
	pthread_mutex_lock(&pf_lock);
	bool is_free = !batch.workers;

	if (is_free) {
		batch.workers = workers;
		batch.count = batch.running = count;
		batch.threads = 0;
		batch.chunk_bytes = chunk_bytes;
		batch.started = prefault_now_ns();
		atomic_store(&batch.next, 0);
		atomic_store(&batch.abort, false);
		pthread_cond_broadcast(&pf_changed);
	}
	pthread_mutex_unlock(&pf_lock);
	return is_free;
}

/* pthread_create() allocates, so do not hold pf_lock. */
static void start_threads(size_t count)
{
	sigset_t mask, before;

	sigfillset(&mask);
	/* pf_kick_thread() sends SIGUSR1. QEMU's handler does nothing in threads without a vCPU. */
	sigdelset(&mask, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &mask, &before);
	while (batch.threads < count) {
		pthread_t *thread = &batch.workers[batch.threads].thread;

		if (!pf_create_thread(thread, run_workers, NULL))
			break;
		pthread_setname_np(*thread, "prefault-batch");
		batch.threads++;
	}
	int error = errno;

	pthread_sigmask(SIG_SETMASK, &before, NULL);
	errno = error;
}

enum request_error pf_batch_start(struct worker_ranges *assigned, size_t count,
				  uint64_t chunk_bytes, char clause[PF_CLAUSE])
{
	struct batch_worker *workers = calloc(count + 1, sizeof(*workers));
	size_t used = 0, threads;

	if (!workers)
		return REQUEST_NO_MEMORY;
	for (size_t i = 0; i < count; i++) {
		struct batch_worker *worker = &workers[used];

		if (!assigned[i].count)
			continue;
		worker->vcpu = pf_prefault_vcpu(0) ? pf_prefault_vcpu(0) : &pf_vcpus[i];
		worker->borrowed = worker->vcpu == &pf_vcpus[i];
		worker->assigned = assigned[i];
		used++;
	}
	threads = allowed_threads(used, clause);
	if (used && !threads) {
		free(workers);
		return REQUEST_NO_THREAD;
	}
	if (!begin(workers, used, chunk_bytes)) {
		free(workers);
		return REQUEST_BUSY;
	}
	start_threads(threads);
	if (!used || batch.threads) /* one thread is enough for all workers */
		return REQUEST_OK;
	snprintf(clause, PF_CLAUSE, "it cannot start a thread: %s. Raise QEMU's limit on threads",
		 strerror(errno));
	pthread_mutex_lock(&pf_lock);
	batch.running = 0;
	pthread_mutex_unlock(&pf_lock);
	pf_batch_end();
	return REQUEST_NO_THREAD;
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
	for (size_t i = 0; i < batch.threads; i++)
		pthread_join(batch.workers[i].thread, NULL);
	pthread_mutex_lock(&pf_lock);
	struct batch_worker *workers = batch.workers;

	batch.workers = NULL;
	batch.count = 0;
	pthread_mutex_unlock(&pf_lock);
	free(workers);
}
