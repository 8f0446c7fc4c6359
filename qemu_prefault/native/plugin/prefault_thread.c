// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "prefault_thread.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "chunk.h"
#include "common/prefault_loop.h"
#include "firmware.h"
#include "options.h"
#include "pace.h"
#include "prefault_vcpu.h"
#include "queue.h"

/*
 * The thread's nice value, because the running guest is more important. SCHED_IDLE would be wrong:
 * on a full host the thread would get no CPU for minutes, with locks held. QEMU itself does not call
 * setpriority(), so a seccomp filter may kill QEMU for it. With a filter, the thread keeps its nice
 * value.
 */
#define NICE 10
#define PACED_CHUNK (MIB(1) / 4) /* as RUNNING_CHUNK, if the thread must end in time */

static bool may_set_priority;
static struct pace pace;
static uint64_t rest_until; /* CLOCK_MONOTONIC, in ns; see pf_options.rate and pace.h */

/* Return a prefault vCPU that is stuck, or NULL. */
static struct vcpu *find_stuck(void)
{
	struct vcpu *vcpu;

	for (unsigned int space = 0; (vcpu = pf_prefault_vcpu(space)); space++)
		if (vcpu->stuck)
			return vcpu;
	return NULL;
}

bool pf_prefault_thread_busy(void)
{
	return pf_prefault_vcpu(0) && !find_stuck() &&
	       (pf_queue_is_ready() || atomic_load(&pf_vcpus_working));
}

bool pf_prefault_thread_boots(void)
{
	bool firmware = pf_firmware_at_work() && !pf_firmware_is_uefi();

	return !pf_queue_held_reason() &&
	       (pf_prefault_thread_busy() || pf_queue_has_deferred() || firmware);
}

static void process(struct work_item item)
{
	uint64_t deadline = pf_pace_begin(&pace, pf_booting);
	uint64_t began = prefault_now_ns();
	bool started = pf_guest_entered;
	struct run_ctx ctx = { .vcpu = pf_prefault_vcpu(item.slot >> 16),
			       .chunk_bytes = started ? RUNNING_CHUNK : CHUNK };

	if (started && deadline) {
		ctx.deadline = deadline;
		ctx.chunk_bytes = PACED_CHUNK;
	}
	ctx.vcpu->tid = (pid_t)syscall(SYS_gettid);
	pf_prefault_vcpu_renew_root(ctx.vcpu, false);
	uint64_t done = pf_chunk_run(item, &ctx);

	if (started) {
		rest_until = pf_pace_end(&pace);
		if (pf_options.rate) {
			uint64_t until = began + done * 1000 / pf_options.rate * 1000000;

			rest_until = until > rest_until ? until : rest_until;
		}
	}
	if (!atomic_load(&pf_work_available) && !atomic_load(&pf_vcpus_working))
		pf_chunk_report(started);
}

/*
 * Wait for a change. If the guest's first memory is prefaulted, first lower the thread's priority:
 * until then, the guest waits for the thread, or would cause the faults itself. The queue is also
 * empty between the deletion and the creation of a slot, so check that no slot has changed for a
 * while.
 */
static void wait_for_change(void)
{
	uint64_t now = prefault_now_ns(), quiet_at = pf_slot_changed_at + QUIET_NS;

	/* The guest's vCPUs do not notice if the work ends while they are in KVM_RUN. */
	if (pf_guest_entered && !pf_prefault_thread_boots())
		pf_booting = false;

	if (!may_set_priority || !pf_guest_entered || pf_queue_has_deferred() ||
	    atomic_load(&pf_work_available)) {
		pthread_cond_wait(&pf_changed, &pf_lock);
	} else if (now < quiet_at) {
		struct timespec deadline = pf_deadline_in(quiet_at - now);

		pthread_cond_timedwait(&pf_changed, &pf_lock, &deadline);
	} else {
		may_set_priority = false;
		setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), NICE);
	}
}

static void *thread(void *unused)
{
	struct work_item item;
	sigset_t kick;

	(void)unused;
	sigemptyset(&kick);
	sigaddset(&kick, SIGUSR1); /* from pf_kick_thread() */
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	pf_pace_start(&pace);
	may_set_priority = pace.may_set;
	pthread_mutex_lock(&pf_lock);
	for (;;) {
		struct vcpu *stuck = find_stuck();
		uint64_t now = prefault_now_ns(), until = stuck ? stuck->retry_at : rest_until;

		if (!pf_prefault_vcpu(0) || !atomic_load(&pf_work_available) ||
		    atomic_load(&pf_slot_changes)) {
			wait_for_change();
			continue;
		}
		if (!pf_firmware_at_work())
			pf_queue_undefer("the firmware has finished");
		if (until > now) {
			struct timespec deadline = pf_deadline_in(until - now);

			pthread_cond_timedwait(&pf_changed, &pf_lock, &deadline);
		} else if (stuck) {
			pf_prefault_vcpu_renew_root(stuck, true);
			stuck->stuck = false;
		} else if (pf_queue_take(&item, true)) {
			process(item);
			pthread_cond_broadcast(&pf_changed);
		} else {
			/* The items that are left must wait for the firmware. */
			struct timespec soon = pf_deadline_in(MS(10));

			pthread_cond_timedwait(&pf_changed, &pf_lock, &soon);
		}
	}
	return NULL;
}

bool pf_prefault_thread_start(void)
{
	pthread_t started;

	pf_pace_open();
	return pf_start_thread(&started, "prefault-vcpu", thread);
}
