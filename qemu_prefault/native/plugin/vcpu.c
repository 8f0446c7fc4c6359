// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "chunk.h"
#include "common/prefault_loop.h"
#include "firmware.h"
#include "guest_start.h"
#include "options.h"
#include "prefault_thread.h"
#include "prefault_vcpu.h"
#include "queue.h"

/* Defined here because the installed kernel headers may predate Linux 6.11. */
#define RUN_SMM (1u << 0)
#define RUN_GUEST_MODE (1u << 2) /* 85542adb65ec, Linux 6.11 */

/*
 * The maximum size of a system call while the guest waits. Such a call takes about 50 us if the
 * memory is absent.
 */
#define STEP (MIB(1) / 4)
/*
 * QEMU removes the slot of UEFI's flash memory when UEFI writes a variable, which takes several
 * milliseconds, and then creates the slot again. UEFI then reads all variables.
 */
#define FLASH_WAIT MS(5)
/* KVM_DIRTY_LOG_PAGE_OFFSET, arch/x86/include/uapi/asm/kvm.h */
#define DIRTY_RING_PAGE 64

static __thread struct vcpu *this_vcpu;

/*
 * A vCPU whose root is obsolete must enter the guest before it prefaults again. Before commit
 * 20a6cff3b283 (v6.15), the ioctl retries on such a vCPU until a signal arrives.
 */
bool pf_vcpu_can_prefault(const struct vcpu *self)
{
	return !self->stuck && prefault_now_ns() >= self->retry_at &&
	       (self->no_root_yet || self->seen_generation == atomic_load(&pf_root_generation));
}

/*
 * Return whether the vCPU is outside SMM and guest mode, in which KVM uses other tables. KVM sets
 * the flags when KVM_RUN returns.
 */
static bool on_own_tables(const struct vcpu *self)
{
	return !(self->run->flags & (RUN_SMM | RUN_GUEST_MODE));
}

/* Wait until another thread changes something, or for 2 ms, because QEMU's kick does not end it. */
static void wait_for_change(void)
{
	struct timespec soon = pf_deadline_in(MS(2));

	pthread_cond_timedwait(&pf_changed, &pf_lock, &soon);
}

/*
 * Return the end of the time in which the guest may wait: pf_options.hold_ns after it began to
 * wait. Before the guest's first instruction, the time is unlimited, and the result is 0.
 */
static uint64_t hold_deadline(const struct vcpu *self, bool first, uint64_t now)
{
	/* In SMM or guest mode, the guest does not wait. */
	if (!pf_stall_start && on_own_tables(self))
		pf_stall_start = now;
	return first ? 0 : (pf_stall_start ? pf_stall_start : now) + pf_options.hold_ns;
}

static void run_chunk(struct work_item item, struct run_ctx *ctx)
{
	bool had_no_root = ctx->vcpu->no_root_yet;

	pf_chunk_run(item, ctx);
	if (had_no_root) {
		ctx->vcpu->no_root_yet = false;
		ctx->vcpu->seen_generation = atomic_load(&pf_root_generation);
	}
}

/*
 * Let the guest wait for the prefault thread while it boots, and for FLASH_WAIT after QEMU has
 * created the slot of UEFI's flash memory again. Otherwise, the guest runs while the thread works.
 *
 * Before the guest's first instruction, the waiting vCPU threads help the prefault thread. They use
 * more CPUs of the host than the one thread, and the first access to a page determines its NUMA
 * node, so the memory is on the nodes of the vCPUs.
 */
static void wait_for_prefault_thread(struct vcpu *self)
{
	bool first = !pf_guest_entered && !pf_incoming;
	uint64_t now = prefault_now_ns();
	uint64_t flash_wait = pf_options.hold_ns < FLASH_WAIT ? pf_options.hold_ns : FLASH_WAIT;
	struct run_ctx ctx = { .vcpu = self, .chunk_bytes = first ? CHUNK : STEP };
	struct work_item item;

	if (!pf_stall_start)
		pf_stall_start = now;
	pf_booting |= !pf_guest_entered || pf_boot_slot_created;
	if (!pf_booting)
		ctx.deadline = pf_flash_slot_created ? now + flash_wait : now;
	else if (!first)
		ctx.deadline = pf_stall_start + pf_options.hold_ns;
	pf_boot_slot_created = pf_flash_slot_created = false;
	while (!pf_options.background && !self->run->immediate_exit &&
	       (!ctx.deadline || prefault_now_ns() < ctx.deadline) &&
	       (pf_prefault_thread_busy() || (first && atomic_load(&pf_slot_changes)))) {
		if (!pf_guest_entered && pf_vcpu_can_prefault(self) &&
		    !atomic_load(&pf_slot_changes) && atomic_load(&pf_work_available) &&
		    pf_queue_take(&item, false)) {
			run_chunk(item, &ctx);
			if (!atomic_load(&pf_work_available) && !atomic_load(&pf_vcpus_working))
				pf_chunk_report(pf_guest_entered);
		} else {
			wait_for_change();
		}
		/* If another vCPU has entered the guest, it may wait for this one. */
		if (!ctx.deadline && pf_guest_entered)
			ctx.deadline = prefault_now_ns() + pf_options.hold_ns;
	}
	if (pf_guest_entered && ctx.deadline && prefault_now_ns() >= ctx.deadline)
		pf_booting = false;
	pf_booting = pf_booting && pf_prefault_thread_boots();
}

/*
 * Work until the queue is empty or the time limit has expired. After that time, the thread works in
 * slices.
 */
static void process_queue(struct vcpu *self, bool first)
{
	uint64_t now = prefault_now_ns();
	struct run_ctx ctx = { .vcpu = self,
			       .deadline = hold_deadline(self, first, now),
			       .chunk_bytes = first ? CHUNK : STEP };
	struct work_item item;
	bool sliced = false;

	if (ctx.deadline && ctx.deadline < now + SLICE) {
		if (now - self->slice_ended < SLICE_EVERY)
			return;
		ctx.deadline = now + SLICE;
		sliced = true;
	}
	while (pf_vcpu_can_prefault(self) && on_own_tables(self) && !self->run->immediate_exit &&
	       (!ctx.deadline || prefault_now_ns() < ctx.deadline)) {
		if (!atomic_load(&pf_slot_changes) && atomic_load(&pf_work_available) &&
		    pf_queue_take(&item, false)) {
			run_chunk(item, &ctx);
		} else if (first ? pf_in_flight || atomic_load(&pf_slot_changes) :
				   !sliced && atomic_load(&pf_vcpus_working)) {
			/*
			 * Wait until the other threads finish their items. A thread that waits for
			 * a host CPU may hold the item with the pages that firmware needs first.
			 */
			wait_for_change();
		} else {
			break;
		}
	}
	self->slice_ended = prefault_now_ns();
	if (!atomic_load(&pf_work_available) || self->started || !self->run->immediate_exit)
		pf_chunk_report(self->started);
}

static void before_run(struct vcpu *self)
{
	pthread_mutex_lock(&pf_lock);
	if (!pf_guest_started)
		pf_guest_start();
	if (!pf_firmware_at_work())
		pf_queue_undefer("the firmware has finished");

	if (pf_prefault_vcpu(0))
		wait_for_prefault_thread(self);
	else
		process_queue(self, !self->started && !pf_incoming);
	if (!self->started && !self->run->immediate_exit) {
		self->started = pf_guest_entered = true;
		pf_slot_changed_at = prefault_now_ns();
	}
	pthread_cond_broadcast(&pf_changed);
	pthread_mutex_unlock(&pf_lock);
}

static struct vcpu *find_vcpu(int fd)
{
	if (this_vcpu && this_vcpu->fd == fd)
		return this_vcpu;
	for (size_t i = 0; i < pf_vcpu_count; i++)
		if (pf_vcpus[i].fd == fd) {
			pf_vcpus[i].tid = (pid_t)syscall(SYS_gettid);
			this_vcpu = &pf_vcpus[i];
			return this_vcpu;
		}
	return NULL;
}

/*
 * End a batch's use of the vCPU. The prefault ioctl may write to kvm_run (kvm_handle_signal_exit(),
 * include/linux/kvm_host.h), so this ioctl must not run between the end of KVM_RUN and the time at
 * which QEMU reads kvm_run.
 */
static void take_back(struct vcpu *self)
{
	pthread_mutex_lock(&pf_lock);
	atomic_store(&self->lent, false);
	while (self->in_use)
		pthread_cond_wait(&pf_changed, &pf_lock);
	pthread_mutex_unlock(&pf_lock);
}

long pf_vcpu_run(int fd)
{
	struct vcpu *self = find_vcpu(fd);

	if (!self || !self->run)
		return pf_raw_ioctl(fd, KVM_RUN, NULL);
	if (atomic_load(&self->lent))
		take_back(self);
	/*
	 * If immediate_exit is set, QEMU only completes an exit or consumes a signal. Do no work.
	 */
	if (!self->run->immediate_exit) {
		if (!self->started || atomic_load(&pf_work_available) ||
		    atomic_load(&pf_vcpus_working))
			before_run(self);
	}

	uint64_t generation = atomic_load(&pf_root_generation);

	atomic_store(&self->in_guest, true);
	long result = pf_raw_ioctl(fd, KVM_RUN, NULL);

	atomic_store(&self->in_guest, false);
	if (!result) { /* the vCPU entered the guest, so KVM has handled its pending requests */
		self->started = true;
		self->no_root_yet = false;
		self->seen_generation = generation;
		self->stuck = false;
	}
	return result;
}

/*
 * Return whether the vCPU has a dirty ring. QEMU enables the rings before it loads plugins. KVM
 * refuses a private mapping only of a page that belongs to a ring (kvm_vcpu_mmap(),
 * virt/kvm/kvm_main.c).
 */
static bool has_dirty_ring(int fd)
{
	void *page = pf_raw_mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 4096 * DIRTY_RING_PAGE);

	if (page == MAP_FAILED)
		return errno == EINVAL;
	munmap(page, 4096);
	return false;
}

void pf_vcpu_created(int fd, unsigned long id)
{
	pthread_mutex_lock(&pf_lock);
	size_t at = pf_vcpu_count;

	if (at < MAX_VCPUS) {
		struct vcpu *vcpu = &pf_vcpus[at];
		void *run = pf_raw_mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);

		*vcpu = (struct vcpu){ .fd = fd,
				       .id = id,
				       .no_root_yet = true,
				       .run = run == MAP_FAILED ? NULL : run };
		pf_vcpu_count = at + 1;
	}
	pf_dirty_ring = pf_dirty_ring || has_dirty_ring(fd);
	pthread_mutex_unlock(&pf_lock);
}
