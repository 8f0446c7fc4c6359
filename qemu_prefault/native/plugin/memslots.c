// SPDX-License-Identifier: GPL-2.0-or-later
#include "memslots.h"

#include <errno.h>
#include <linux/kvm.h>

#include "common/prefault_loop.h"
#include "event_log.h"
#include "firmware.h"
#include "guest_ranges.h"
#include "prefault_vcpu.h"
#include "queue.h"
#include "state.h"

#define MEM_GUEST_MEMFD (1u << 2) /* Linux 6.8; the installed headers may predate it */

static size_t slot_room;

/* Return whether the plugin prefaults a slot of SMM's address space. */
static bool used_in_smm(const struct memslot *slot)
{
	if (!pf_prefault_vcpu(1))
		return false;
	return slot->gpa < PF_SMM_END || (slot->gpa < GIB(4) && pf_firmware_is_uefi());
}

static void classify(struct memslot *slot)
{
	slot->state = SLOT_SKIPPED;
	if (!pf_capable)
		slot->why = "this KVM has no KVM_PRE_FAULT_MEMORY";
	else if (slot->id >> 16 && !used_in_smm(slot))
		slot->why = "SMM address space";
	else if (slot->flags & MEM_GUEST_MEMFD)
		slot->why = "guest_memfd";
	else if (slot->flags & KVM_MEM_LOG_DIRTY_PAGES) {
		slot->state = SLOT_HELD;
		slot->why = "dirty logging";
	} else {
		slot->state = SLOT_KEPT;
		slot->why = NULL;
	}
}

void pf_memslots_classify_again(void)
{
	for (size_t i = 0; i < pf_memslot_count; i++)
		classify(&pf_memslots[i]);
}

/* Queue all slots again. If the quirk is enabled, KVM drops all tables when a slot is deleted. */
static void tables_dropped(void)
{
	atomic_fetch_add(&pf_root_generation, 1);
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
}

static void slot_deleted(struct memslot *slot)
{
	pf_log_event("slot-deleted", NULL, ",\"gpa\":%llu,\"size\":%llu",
		     (unsigned long long)slot->gpa, (unsigned long long)slot->size);
	pf_queue_drop_memslot(slot->id);
	*slot = pf_memslots[--pf_memslot_count];
	pf_counters.deleted++;
	if (pf_quirk != QUIRK_DISABLED && pf_guest_started)
		tables_dropped();
}

static void slot_created(const struct kvm_userspace_memory_region *region)
{
	if (!pf_grow((void **)&pf_memslots, &slot_room, pf_memslot_count, sizeof(*pf_memslots))) {
		pf_counters.errors++;
		return;
	}
	struct memslot *slot = &pf_memslots[pf_memslot_count++];

	*slot = (struct memslot){ .id = region->slot,
				  .flags = region->flags,
				  .gpa = region->guest_phys_addr,
				  .size = region->memory_size,
				  .hva = region->userspace_addr,
				  .created_logged = region->flags & KVM_MEM_LOG_DIRTY_PAGES };
	pf_counters.created++;
	if (!pf_guest_ranges_touch(slot->hva, slot->size))
		pf_guest_ranges_add(slot->hva, slot->hva + slot->size, 0, 0);
	if (slot->gpa <= MIB(1) && !pf_queue_held_reason())
		pf_boot_slot_created = true;
	if (slot->flags & KVM_MEM_READONLY && slot->gpa >= MIB(1) && pf_firmware_is_uefi())
		pf_flash_slot_created = true;
	classify(slot);
	pf_log_event("slot-created", slot->why, ",\"gpa\":%llu,\"size\":%llu",
		     (unsigned long long)slot->gpa, (unsigned long long)slot->size);
	if (slot->state == SLOT_KEPT)
		pf_queue_memslot(slot);
}

static void slot_flags_changed(struct memslot *slot, uint32_t flags)
{
	enum memslot_state before = slot->state;

	slot->flags = flags;
	slot->created_logged &= (flags & KVM_MEM_LOG_DIRTY_PAGES) != 0;
	classify(slot);
	if (slot->state == before)
		return;
	pf_queue_drop_memslot(slot->id);
	if (slot->state == SLOT_HELD)
		pf_log_event("held", slot->why, ",\"gpa\":%llu,\"size\":%llu",
			     (unsigned long long)slot->gpa, (unsigned long long)slot->size);
	if (slot->state == SLOT_KEPT) {
		pf_log_event("released", "dirty logging ended", ",\"gpa\":%llu,\"size\":%llu",
			     (unsigned long long)slot->gpa, (unsigned long long)slot->size);
		pf_queue_memslot(slot);
	}
}

static void kick_busy(void)
{
	for (size_t i = 0; i < pf_vcpu_count; i++)
		if (atomic_load(&pf_vcpus[i].busy_since))
			pf_kick_thread(pf_vcpus[i].tid);
	struct vcpu *vcpu;

	for (unsigned int space = 0; (vcpu = pf_prefault_vcpu(space)); space++)
		if (atomic_load(&vcpu->busy_since))
			pf_kick_thread(vcpu->tid);
}

/*
 * Before KVM changes a slot, it waits for every running prefault ioctl. Without commit 3ccbf6f47098
 * (v6.18), such an ioctl in turn waits until a slot that is being deleted no longer exists.
 * Therefore no thread may be in the ioctl during the change. A kicked thread returns after the
 * current page.
 */
long pf_memslots_change(int fd, unsigned long request, void *argument)
{
	const struct kvm_userspace_memory_region *region = argument;
	long result;
	int error;

	pthread_mutex_lock(&pf_lock);
	atomic_fetch_add(&pf_slot_changes, 1);
	if (pf_in_flight)
		kick_busy();
	while (pf_in_flight)
		pthread_cond_wait(&pf_changed, &pf_lock);
	pthread_mutex_unlock(&pf_lock);

	result = pf_raw_ioctl(fd, request, argument);
	error = errno;

	pthread_mutex_lock(&pf_lock);
	atomic_fetch_sub(&pf_slot_changes, 1);
	if (!result && fd == pf_vm_fd) {
		struct memslot *slot = pf_find_memslot(region->slot);

		/* Ignore UEFI's flash, whose slot QEMU removes when UEFI writes a variable. */
		if (!((slot ? slot->flags : region->flags) & KVM_MEM_READONLY))
			pf_slot_changed_at = prefault_now_ns();
		if (slot && region->memory_size == slot->size &&
		    region->guest_phys_addr == slot->gpa && region->userspace_addr == slot->hva) {
			slot_flags_changed(slot, region->flags);
		} else {
			if (slot)
				slot_deleted(slot);
			if (region->memory_size)
				slot_created(region);
		}
		pf_queue_update();
	}
	pthread_cond_broadcast(&pf_changed);
	pthread_mutex_unlock(&pf_lock);
	errno = error;
	return result;
}
