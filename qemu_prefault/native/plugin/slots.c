// SPDX-License-Identifier: GPL-2.0-or-later
#include "keeper_state.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>

#include "host_memory.h"

#define MEM_GUEST_MEMFD (1u << 2) /* Linux 6.8; a distribution's headers may be older */
/*
 * What firmware touches of low RAM: the beginning, and as SeaBIOS does (src/malloc.c) the
 * last 16 MiB and what is just below.
 */
#define HEAD MIB(2)
#define TAIL MIB(18)
#define RESET_VECTOR 0xffff0 /* a jump, once the firmware is there */

struct slot *slots;
size_t slot_count;
struct piece *pieces;
size_t piece_count;
static size_t slot_room, piece_room;
uint64_t held_since, slot_changed_at;

struct slot *find_slot(uint32_t id)
{
	for (size_t i = 0; i < slot_count; i++)
		if (slots[i].id == id)
			return &slots[i];
	return NULL;
}

static struct slot *slot_at_gpa(uint64_t gpa)
{
	for (size_t i = 0; i < slot_count; i++)
		if (!(slots[i].id >> 16) && slots[i].gpa <= gpa &&
		    gpa < slots[i].gpa + slots[i].size)
			return &slots[i];
	return NULL;
}

struct slot *slot_at_hva(uint64_t hva)
{
	for (size_t i = 0; i < slot_count; i++)
		if (!(slots[i].id >> 16) && slots[i].hva <= hva &&
		    hva < slots[i].hva + slots[i].size)
			return &slots[i];
	return NULL;
}

static bool grow(void **array, size_t *room, size_t count, size_t item)
{
	if (count < *room)
		return true;
	size_t wanted = *room ? 2 * *room : 64;
	void *more = realloc(*array, wanted * item);

	if (!more)
		return false;
	*array = more;
	*room = wanted;
	return true;
}

void add_piece(struct piece piece)
{
	if (!piece.size || !(piece.populate || piece.stage2))
		return;
	if (!grow((void **)&pieces, &piece_room, piece_count, sizeof(*pieces))) {
		counters.errors++;
		return;
	}
	pieces[piece_count++] = piece;
}

void put_first(struct piece piece)
{
	if (!piece.size || !grow((void **)&pieces, &piece_room, piece_count, sizeof(*pieces)))
		return;
	memmove(pieces + 1, pieces, piece_count++ * sizeof(*pieces));
	pieces[0] = piece;
}

void remove_piece(size_t at)
{
	memmove(pieces + at, pieces + at + 1, (--piece_count - at) * sizeof(*pieces));
}

void drop_pieces(uint32_t slot)
{
	size_t kept = 0;

	for (size_t i = 0; i < piece_count; i++)
		if (pieces[i].slot != slot)
			pieces[kept++] = pieces[i];
	piece_count = kept;
}

const char *held_reason(void)
{
	if (!options.keep || paused)
		return "paused";
	return userfaults > 0 ? "postcopy" : NULL;
}

/*
 * How far pc's and q35's firmware is with low RAM. It copies itself below 1 MiB, for which
 * QEMU deletes and re-creates the slot of low RAM three times (PAM, hw/pci-host/pam.c).
 *
 *   at reset    0xf0000 is the flash, read-only      more to come
 *   at work     it is RAM, one slot with what is above 1 MiB    more to come
 *   done        it is a read-only slot of RAM
 *
 * microvm maps its firmware there as memory, and changes nothing.
 */
bool firmware_at_work(void)
{
	const struct slot *low = slot_at_gpa(0), *bios = slot_at_gpa(0xf0000);

	if (!low || !bios)
		return false;
	if (bios->flags & KVM_MEM_READONLY)
		return bios->hva - bios->gpa != low->hva - low->gpa;
	return bios->gpa + bios->size > MIB(1);
}

/*
 * SeaBIOS made 0xf0000 RAM, and is yet to copy itself there (src/fw/shadow.c). QEMU's reset
 * leaves PAM as it is: if it comes now, the guest starts among zeros and never gets further.
 * This moment is no time to linger.
 */
bool firmware_copies_itself(void)
{
	const struct slot *bios = slot_at_gpa(RESET_VECTOR);
	uint64_t hva;

	if (!bios || bios->flags & KVM_MEM_READONLY ||
	    prefault_now_ns() > slot_changed_at + QUIET)
		return false;
	hva = bios->hva + RESET_VECTOR - bios->gpa;
	return memory_present(hva & ~4095ull, 4096) != 4096 || !*(const volatile uint8_t *)hva;
}

/* Whether anything can be taken now. The lock is held; vCPUs look at it without. */
void update_work(void)
{
	bool found = false;

	for (size_t i = 0; i < piece_count && !found; i++)
		found = !pieces[i].deferred || !firmware_at_work();
	atomic_store(&work, found && capable && !held_reason());
}

/*
 * Low RAM's slot goes again while firmware is at work; with the quirk, all tables do.
 * Whether it is, shows when QEMU has made all its changes: see before_run().
 */
static bool to_be_deferred(const struct slot *slot)
{
	return quirk != QUIRK_DISABLED || slot->gpa < GIB(4);
}

static bool may_populate(uint64_t hva, uint64_t size)
{
	if (options.populate != POPULATE_AUTO)
		return options.populate == POPULATE_ALL;
	return !(memory_facts(hva, size) &
		 (MEMORY_OVERCOMMIT | MEMORY_HOLES | MEMORY_DISK_FILE));
}

/*
 * Queue the whole slot: its ends first, that is where firmware lives. What has to be
 * populated first is memory that came while the guest runs: it need not wait for that.
 */
void queue_slot(struct slot *slot)
{
	uint64_t new_bytes = 0;

	bool touch = !(slot->flags & KVM_MEM_READONLY) && may_populate(slot->hva, slot->size);
	bool deferred = to_be_deferred(slot);
	uint64_t low = slot->size < HEAD ? slot->size : HEAD;
	uint64_t high = slot->size - low < TAIL ? slot->size - low : TAIL;
	const uint64_t cuts[3][2] = { { 0, low },
				      { slot->size - high, slot->size },
				      { low, slot->size - high } };

	drop_pieces(slot->id);
	slot->resident_only = !touch;
	slot->prefaulted = 0;
	/* Somebody waits for a guest that comes from elsewhere: first what it brought along. */
	if (incoming && !guest_entered && touch)
		add_piece((struct piece){ .gpa = slot->gpa, .hva = slot->hva, .size = slot->size,
					  .slot = slot->id, .stage2 = true, .resident = true });
	for (int i = 0; i < 3; i++) {
		uint64_t at = cuts[i][0], end = cuts[i][1], from, length;
		struct piece piece = { .slot = slot->id, .stage2 = true, .resident = !touch,
				       .deferred = deferred && i == 2 };

		while (touch && memory_unmarked(MEMORY_POPULATED, slot->hva + at, end - at, &from, &length)) {
			from -= slot->hva;
			piece.gpa = slot->gpa + at, piece.hva = slot->hva + at;
			piece.size = from - at;
			add_piece(piece);
			piece.gpa = slot->gpa + from, piece.hva = slot->hva + from;
			piece.size = length;
			piece.populate = true;
			new_bytes += length;
			if (piece.deferred) { /* the host's part lasts: only stage 2 has to wait */
				struct piece now = piece;

				now.deferred = now.stage2 = false;
				add_piece(now);
				piece.populate = false;
			}
			add_piece(piece);
			piece.populate = false;
			at = from + length;
		}
		piece.gpa = slot->gpa + at, piece.hva = slot->hva + at;
		piece.size = end - at;
		add_piece(piece);
	}
	if (!guest_entered || new_bytes < HEAD)
		held_since = 0;
	else if (!held_since)
		held_since = 1; /* long ago: do it in slices */
}

static void classify(struct slot *slot)
{
	slot->state = SLOT_SKIPPED;
	if (!capable)
		slot->why = "this KVM cannot";
	else if (slot->id >> 16)
		slot->why = "SMM's address space";
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

/* Nothing changes any more, or firmware said it is done: what was put off is due. */
void undefer(const char *why)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < piece_count; i++) {
		bytes += pieces[i].deferred ? pieces[i].size : 0;
		pieces[i].deferred = false;
	}
	if (bytes) {
		event("due", why, ",\"bytes\":%llu", (unsigned long long)bytes);
		held_since = 0;
		update_work();
	}
}

/* Deleting a slot drops every table, unless the quirk is off. Then all of it is to do again. */
static void tables_dropped(void)
{
	atomic_fetch_add(&zaps, 1);
	for (size_t i = 0; i < slot_count; i++)
		if (slots[i].state == SLOT_KEPT)
			queue_slot(&slots[i]);
}

static void slot_deleted(struct slot *slot)
{
	event("slot-deleted", NULL, ",\"gpa\":%llu,\"size\":%llu", (unsigned long long)slot->gpa,
	      (unsigned long long)slot->size);
	drop_pieces(slot->id);
	*slot = slots[--slot_count];
	counters.deleted++;
	if (quirk != QUIRK_DISABLED && guest_started)
		tables_dropped();
}

static void slot_created(const struct kvm_userspace_memory_region *region)
{
	if (!grow((void **)&slots, &slot_room, slot_count, sizeof(*slots))) {
		counters.errors++;
		return;
	}
	struct slot *slot = &slots[slot_count++];

	*slot = (struct slot){ .id = region->slot, .flags = region->flags,
			       .gpa = region->guest_phys_addr, .size = region->memory_size,
			       .hva = region->userspace_addr };
	counters.created++;
	classify(slot);
	event("slot-created", slot->why, ",\"gpa\":%llu,\"size\":%llu",
	      (unsigned long long)slot->gpa, (unsigned long long)slot->size);
	if (slot->state == SLOT_KEPT)
		queue_slot(slot);
}

static void slot_flags_changed(struct slot *slot, uint32_t flags)
{
	enum slot_state before = slot->state;

	slot->flags = flags;
	classify(slot);
	if (slot->state == before)
		return;
	drop_pieces(slot->id);
	if (slot->state == SLOT_HELD)
		event("held", slot->why, ",\"gpa\":%llu,\"size\":%llu",
		      (unsigned long long)slot->gpa, (unsigned long long)slot->size);
	if (slot->state == SLOT_KEPT) {
		event("released", "dirty logging ended", ",\"gpa\":%llu,\"size\":%llu",
		      (unsigned long long)slot->gpa, (unsigned long long)slot->size);
		queue_slot(slot);
	}
}

/* From now on only what is resident, for all of the slot. The lock is held. */
void make_resident_only(struct slot *slot)
{
	slot->resident_only = true;
	for (size_t i = 0; i < piece_count;) {
		struct piece *piece = &pieces[i];

		if (piece->slot == slot->id) {
			piece->resident = true;
			piece->populate = false;
			if (!piece->stage2) {
				remove_piece(i);
				continue;
			}
		}
		i++;
	}
	update_work();
}

uint64_t pending_bytes(void)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < piece_count; i++)
		bytes += pieces[i].stage2 ? pieces[i].size : 0;
	for (size_t i = 0; i < vcpu_count; i++)
		bytes += vcpus[i].in_hand.stage2 ? vcpus[i].in_hand.size : 0;
	return bytes;
}

static void kick_busy(void)
{
	for (size_t i = 0; i < vcpu_count; i++)
		if (atomic_load(&vcpus[i].busy_since))
			interrupt(vcpus[i].tid);
}

/*
 * KVM waits for every ioctl under way before it changes a slot, and before commit
 * 3ccbf6f47098 (v6.18) the ioctl waits for the slot that is being deleted: so nobody may
 * be in it. Those who are get out after the page they are at.
 */
long keeper_change_slot(int fd, unsigned long request, void *argument)
{
	const struct kvm_userspace_memory_region *region = argument;
	long result;
	int error;

	pthread_mutex_lock(&lock);
	atomic_fetch_add(&changing, 1);
	if (in_flight)
		kick_busy();
	while (in_flight)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);

	result = raw_ioctl(fd, request, argument);
	error = errno;

	pthread_mutex_lock(&lock);
	atomic_fetch_sub(&changing, 1);
	if (!result && fd == vm_fd) {
		struct slot *slot = find_slot(region->slot);

		/* Not UEFI's flash, which is no memory while it is written: at each variable. */
		if (!((slot ? slot->flags : region->flags) & KVM_MEM_READONLY))
			slot_changed_at = prefault_now_ns();
		if (slot && region->memory_size == slot->size &&
		    region->guest_phys_addr == slot->gpa &&
		    region->userspace_addr == slot->hva) {
			slot_flags_changed(slot, region->flags);
		} else {
			if (slot)
				slot_deleted(slot);
			if (region->memory_size)
				slot_created(region);
		}
		update_work();
	}
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	errno = error;
	return result;
}
