// SPDX-License-Identifier: GPL-2.0-or-later
#include "queue.h"

#include <linux/kvm.h>
#include <string.h>

#include "event_log.h"
#include "firmware.h"
#include "host_ranges.h"
#include "options.h"
#include "prefault_vcpu.h"

/*
 * The sizes of the head and the tail of low RAM, which firmware touches. SeaBIOS uses the last 16
 * MiB (src/malloc.c) and some memory just below. OVMF unpacks itself below 32 MiB
 * (OvmfPkg/Include/Fdf/MemFd.fdf.inc), and allocates memory downwards from the end of low RAM. SMM
 * uses the last 16 MiB (TSEG) and buffers in this memory.
 */
#define HEAD MIB(2)
#define TAIL MIB(18)
#define UEFI_HEAD MIB(32)
#define UEFI_TAIL MIB(80)
/* The rest is queued in pieces. */
#define PIECE MIB(32)
#define MOST_PIECES 256

static size_t queue_room;

const char *pf_queue_held_reason(void)
{
	if (!pf_options.keep || pf_paused)
		return "paused";
	if (pf_logs_to_ring())
		return "dirty ring";
	if (pf_userfault == USERFAULT_SNAPSHOT)
		return "background snapshot";
	return pf_userfault == USERFAULT_POSTCOPY ? "postcopy" : NULL;
}

void pf_queue_add(struct work_item item)
{
	if (!item.size || !(item.populate || item.stage2))
		return;
	if (!pf_grow((void **)&pf_queue, &queue_room, pf_queue_length, sizeof(*pf_queue))) {
		pf_counters.errors++;
		return;
	}
	pf_queue[pf_queue_length++] = item;
}

static void put_first(struct work_item item)
{
	if (!item.size ||
	    !pf_grow((void **)&pf_queue, &queue_room, pf_queue_length, sizeof(*pf_queue)))
		return;
	memmove(pf_queue + 1, pf_queue, pf_queue_length++ * sizeof(*pf_queue));
	pf_queue[0] = item;
}

static void remove_item(size_t at)
{
	memmove(pf_queue + at, pf_queue + at + 1, (--pf_queue_length - at) * sizeof(*pf_queue));
}

void pf_queue_drop_memslot(uint32_t slot)
{
	size_t kept = 0;

	for (size_t i = 0; i < pf_queue_length; i++)
		if (pf_queue[i].slot != slot)
			pf_queue[kept++] = pf_queue[i];
	pf_queue_length = kept;
}

void pf_queue_update(void)
{
	bool found = false;

	for (size_t i = 0; i < pf_queue_length && !found; i++)
		found = !pf_queue[i].deferred || !pf_firmware_at_work();
	atomic_store(&pf_work_available, found && pf_capable && !pf_queue_held_reason());
}

/* Return the end of the memory that can be processed now. */
static uint64_t end_of_ready(void)
{
	return pf_firmware_copies_itself() ? MIB(1) : UINT64_MAX;
}

/* Return the index of the first item that is ready, or pf_queue_length. See pf_queue_take(). */
static size_t first_ready(uint64_t end, bool smm)
{
	size_t i = 0;

	while (i < pf_queue_length &&
	       (pf_queue[i].deferred || pf_queue[i].gpa >= end || (!smm && pf_queue[i].slot >> 16)))
		i++;
	return i;
}

bool pf_queue_has_deferred(void)
{
	for (size_t i = 0; i < pf_queue_length; i++)
		if (pf_queue[i].deferred)
			return true;
	return false;
}

bool pf_queue_is_ready(void)
{
	return atomic_load(&pf_work_available) &&
	       first_ready(end_of_ready(), true) < pf_queue_length;
}

bool pf_queue_take(struct work_item *taken, bool smm)
{
	uint64_t end = end_of_ready(), from, length;
	size_t at = first_ready(end, smm);

	if (at == pf_queue_length)
		return false;
	struct work_item *item = &pf_queue[at];

	*taken = *item;
	if (taken->size > end - taken->gpa)
		taken->size = end - taken->gpa;
	/* Cut at a huge page boundary, so that two threads never populate the same page. */
	if (taken->size > CHUNK)
		taken->size = CHUNK - (taken->hva + CHUNK) % MIB(2);
	/* Another item may populate this memory later. Populate it before the ioctl. */
	if (taken->stage2 && !taken->resident &&
	    pf_ranges_unmarked(MEMORY_POPULATED, taken->hva, taken->size, &from, &length))
		taken->populate = true;
	if (taken->populate && pf_populating >= MOST_POPULATING)
		return false;
	item->gpa += taken->size;
	item->hva += taken->size;
	item->size -= taken->size;
	if (!item->size) {
		remove_item(at);
		pf_queue_update();
	}
	return true;
}

void pf_queue_put_back(struct work_item item, uint64_t done)
{
	item.gpa += done;
	item.hva += done;
	item.size -= done;
	if (!pf_find_memslot(item.slot))
		return;
	put_first(item);
	pf_queue_update();
}

/*
 * Return whether to wait until the firmware has finished. While the firmware copies itself, QEMU
 * deletes the low-RAM slot. If the quirk is enabled, KVM then drops all tables. before_run() in
 * vcpu.c ends the wait.
 */
static bool to_be_deferred(const struct memslot *slot)
{
	return pf_quirk != QUIRK_DISABLED || slot->gpa < GIB(4);
}

static bool may_populate(uint64_t hva, uint64_t size)
{
	if (pf_options.populate != POPULATE_AUTO)
		return pf_options.populate == POPULATE_ALL;
	return !(pf_ranges_facts(hva, size) &
		 (MEMORY_OVERCOMMIT | MEMORY_HOLES | MEMORY_DISK_FILE));
}

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Return the size of the slot's part below an address. */
static uint64_t below(const struct memslot *slot, uint64_t address)
{
	return slot->gpa < address ? least(slot->size, address - slot->gpa) : 0;
}

/* Queue the part [at, end) of a slot, in bytes from its start. Returns the bytes to populate. */
static uint64_t queue_part(const struct memslot *slot, uint64_t at, uint64_t end, bool deferred)
{
	struct work_item item = { .slot = slot->id,
				  .stage2 = true,
				  .resident = slot->resident_only,
				  .deferred = deferred };
	uint64_t from, length, new_bytes = 0;

	while (!slot->resident_only &&
	       pf_ranges_unmarked(MEMORY_POPULATED, slot->hva + at, end - at, &from, &length)) {
		from -= slot->hva;
		item.gpa = slot->gpa + at, item.hva = slot->hva + at;
		item.size = from - at;
		pf_queue_add(item);
		item.gpa = slot->gpa + from, item.hva = slot->hva + from;
		item.size = length;
		item.populate = true;
		new_bytes += length;
		if (item.deferred) { /* pages stay populated if tables are dropped */
			struct work_item now = item;

			now.deferred = now.stage2 = false;
			pf_queue_add(now);
			item.populate = false;
		}
		pf_queue_add(item);
		item.populate = false;
		at = from + length;
	}
	item.gpa = slot->gpa + at, item.hva = slot->hva + at;
	item.size = end - at;
	pf_queue_add(item);
	return new_bytes;
}

/*
 * Queue the slot's head and tail first, because firmware uses them, and then pieces from both ends
 * to the middle: a boot loader puts Linux at the start and its initial RAM disk at the end. If memory
 * must be populated while the guest runs, the memory is new, and the guest does not have to wait
 * until it is populated.
 */
void pf_queue_memslot(struct memslot *slot)
{
	uint64_t new_bytes, whole = slot->size, piece = whole / MOST_PIECES & ~(MIB(2) - 1);
	bool touch = !(slot->flags & KVM_MEM_READONLY) && may_populate(slot->hva, slot->size);
	bool uefi = pf_firmware_is_uefi(), smm = slot->id >> 16;
	uint64_t low = smm ? below(slot, PF_SMM_END) : least(whole, uefi ? UEFI_HEAD : HEAD);
	uint64_t high = smm && !uefi ? 0 : least(whole - low, uefi ? UEFI_TAIL : TAIL);

	pf_queue_drop_memslot(slot->id);
	slot->resident_only = !touch;
	slot->prefaulted = 0;
	/* An incoming guest is down until it starts. Map the migrated pages first. */
	if (pf_incoming && !pf_guest_entered && touch && !smm)
		pf_queue_add((struct work_item){ .gpa = slot->gpa,
						 .hva = slot->hva,
						 .size = whole,
						 .slot = slot->id,
						 .stage2 = true,
						 .resident = true });
	new_bytes = queue_part(slot, 0, low, false);
	new_bytes += queue_part(slot, whole - high, whole, false);
	piece = piece > PIECE ? piece : PIECE;
	for (uint64_t start = low, end = smm ? low : whole - high; start < end;) {
		uint64_t size = least(piece, end - start);

		new_bytes += queue_part(slot, start, start + size, to_be_deferred(slot));
		start += size;
		size = least(piece, end - start);
		new_bytes += queue_part(slot, end - size, end, to_be_deferred(slot));
		end -= size;
	}
	if (!pf_guest_entered || new_bytes < HEAD)
		pf_stall_start = 0;
	else if (!pf_stall_start)
		pf_stall_start = 1; /* long ago, so that before_run() works in slices */
}

/*
 * Called when the slots have stopped changing or the firmware has finished. The deferred items now
 * also populate, so the items that only populate the same memory are removed. Otherwise, the guest
 * would run until all memory is populated before the first deferred item is prefaulted.
 */
void pf_queue_undefer(const char *why)
{
	uint64_t bytes = 0, from, length;

	for (size_t i = 0; i < pf_queue_length; i++) {
		struct work_item *item = &pf_queue[i];

		if (!item->deferred)
			continue;
		item->deferred = false;
		/* claims.c counts the items that populate. */
		item->populate = !item->resident && pf_ranges_unmarked(MEMORY_POPULATED, item->hva,
								       item->size, &from, &length);
		bytes += item->size;
	}
	for (size_t i = 0; bytes && i < pf_queue_length;)
		if (!pf_queue[i].stage2)
			remove_item(i);
		else
			i++;
	if (bytes) {
		pf_log_event("due", why, ",\"bytes\":%llu", (unsigned long long)bytes);
		pf_stall_start = 0;
		pf_queue_update();
	}
}

void pf_queue_make_resident_only(struct memslot *slot)
{
	slot->resident_only = true;
	for (size_t i = 0; i < pf_queue_length;) {
		struct work_item *item = &pf_queue[i];

		if (item->slot == slot->id) {
			item->resident = true;
			item->populate = false;
			if (!item->stage2) {
				remove_item(i);
				continue;
			}
		}
		i++;
	}
	pf_queue_update();
}

uint64_t pf_queue_pending_bytes(void)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < pf_queue_length; i++)
		bytes += pf_queue[i].stage2 ? pf_queue[i].size : 0;
	for (size_t i = 0; i < pf_vcpu_count; i++)
		bytes += pf_vcpus[i].in_progress.stage2 ? pf_vcpus[i].in_progress.size : 0;
	const struct vcpu *vcpu;

	for (unsigned int space = 0; (vcpu = pf_prefault_vcpu(space)); space++)
		bytes += vcpu->in_progress.stage2 ? vcpu->in_progress.size : 0;
	return bytes;
}
