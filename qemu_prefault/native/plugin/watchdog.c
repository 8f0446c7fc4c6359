// SPDX-License-Identifier: GPL-2.0-or-later
#include "watchdog.h"

#include "batch.h"
#include "common/prefault_loop.h"
#include "event_log.h"
#include "firmware.h"
#include "messages.h"
#include "prefault_vcpu.h"
#include "qemu_memory.h"
#include "queue.h"
#include "state.h"
#include "vcpu.h"

/*
 * Return after which time without slot changes the firmware has probably finished. The memslots show
 * when SeaBIOS has finished, so the time matters only for other firmware. With UEFI and prefault
 * vCPUs, the thread would only repeat some work if the firmware still changed a slot.
 */
static uint64_t quiet_ns(void)
{
	return pf_firmware_is_uefi() && pf_prefault_vcpu(0) ? QUIET_NS / 4 : QUIET_NS;
}

static void kick_stuck_prefault_vcpus(uint64_t now)
{
	struct vcpu *vcpu;

	for (unsigned int space = 0; (vcpu = pf_prefault_vcpu(space)); space++) {
		uint64_t since = atomic_load(&vcpu->busy_since);

		if (since && now > since + STUCK_NS)
			pf_kick_thread(vcpu->tid);
	}
}

/*
 * The watchdog does not prefault. If work is available and no vCPU thread processes it, the
 * watchdog kicks vCPUs out of the guest. It also interrupts stuck ioctls, and makes deferred items
 * ready when slots have not changed for quiet_ns().
 */
static void *watchdog(void *unused)
{
	uint64_t kicked_at = 0;

	(void)unused;
	pthread_mutex_lock(&pf_lock);
	for (;;) {
		uint64_t now = prefault_now_ns();
		bool deferred = pf_queue_has_deferred();

		if (pf_messages_need_writer()) {
			pthread_mutex_unlock(&pf_lock);
			pf_messages_start_writer();
			pthread_mutex_lock(&pf_lock);
			continue;
		}
		pf_qemu_memory_check_userfaults();
		if (!(atomic_load(&pf_work_available) || (deferred && pf_guest_entered) ||
		      pf_in_flight || pf_batch_running() || pf_userfault != USERFAULT_NONE)) {
			pthread_cond_wait(&pf_changed, &pf_lock);
			continue;
		}
		for (size_t i = 0; i < pf_vcpu_count; i++) {
			uint64_t since = atomic_load(&pf_vcpus[i].busy_since);

			if (since && now > since + STUCK_NS)
				pf_kick_thread(pf_vcpus[i].tid);
		}
		kick_stuck_prefault_vcpus(now);
		pf_batch_kick();
		if (deferred && pf_guest_entered && !pf_queue_held_reason() &&
		    now > pf_slot_changed_at + quiet_ns())
			pf_queue_undefer("the slots have stopped changing");
		bool kicked = false;

		if (!pf_prefault_vcpu(0) && atomic_load(&pf_work_available) && !pf_in_flight &&
		    !atomic_load(&pf_slot_changes) && now > kicked_at + SLICE_EVERY) {
			for (size_t i = 0; i < pf_vcpu_count; i++)
				if (atomic_load(&pf_vcpus[i].in_guest) &&
				    pf_vcpu_can_prefault(&pf_vcpus[i])) {
					pf_kick_thread(pf_vcpus[i].tid);
					kicked = true;
				}
			kicked_at = now;
		}
		struct timespec soon =
			pf_deadline_in(kicked || pf_in_flight ? SLICE_EVERY : MS(100));

		pthread_cond_timedwait(&pf_changed, &pf_lock, &soon);
	}
	return NULL;
}

bool pf_watchdog_start(void)
{
	pthread_t thread;

	return pf_start_thread(&thread, "prefault", watchdog);
}
