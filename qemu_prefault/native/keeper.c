// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "keeper.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "control_socket.h"
#include "host_memory.h"

// Spelt out: a distribution's headers may be older.
#define CAP_DISABLE_QUIRKS2 213
#define CAP_PRE_FAULT_MEMORY 236
#define QUIRK_SLOT_ZAP_ALL (1u << 7) /* Linux 6.12 */
#define MEM_GUEST_MEMFD (1u << 2)
#define RUN_SMM (1u << 0)
#define RUN_GUEST_MODE (1u << 2) /* 85542adb65ec, Linux 6.11 */

enum {
	MAX_VCPUS = 4096,
	EVENTS = 256,
	EVENT_LENGTH = 320,
};

#define MIB(n) ((uint64_t)(n) << 20)
#define GIB(n) ((uint64_t)(n) << 30)
#define MS(n) ((uint64_t)(n) * 1000000)
#define CHUNK MIB(8) /* between two looks at whether somebody wants the vCPU */
/*
 * What firmware touches of low RAM: the beginning, and as SeaBIOS does (src/malloc.c) the
 * last 16 MiB and what is just below.
 */
#define HEAD MIB(2)
#define TAIL MIB(18)
#define RESET_VECTOR 0xffff0 /* a jump, once the firmware is there */
#define QUIET MS(1000) /* no slot changed for so long: firmware is not at it */
#define SLICE MS(2)  /* work at one go when the guest has waited long enough */
#define SLICE_EVERY MS(10)
#define STUCK MS(500) /* in the ioctl without mapping a page */

enum slot_state { SLOT_SKIPPED, SLOT_HELD, SLOT_KEPT };

struct slot {
	uint32_t id; /* the address space in the upper half */
	uint32_t flags;
	uint64_t gpa, size, hva;
	enum slot_state state;
	bool resident_only;
	const char *why;
	uint64_t prefaulted; /* bytes, since it was created */
};

/* A piece of a slot that is yet to be done. */
struct piece {
	uint64_t gpa, size, hva;
	uint32_t slot;
	bool populate, stage2;
	bool resident; /* only pages that are there */
	bool deferred; /* until firmware is done with its slots */
};

struct vcpu {
	int fd;
	unsigned long id;
	pid_t tid;
	struct kvm_run *run;
	atomic_bool in_guest;
	bool fresh;	    /* has no root yet: nothing that could be stale */
	bool started; /* was let into the guest */
	uint64_t zaps_seen; /* when it last came back from the guest */
	atomic_uint_least64_t busy_since; /* its thread is in a system call for us; 0: not */
	bool stuck; /* until it has been in the guest, and some time has passed: */
	uint64_t retry_at;
	struct piece in_hand; /* taken from the queue, and not done; its size is 0: nothing */
	uint64_t slice_ended;
};

/* A share of a batch from outside, run by a thread of our own on a vCPU that is stopped. */
struct batch_worker {
	struct vcpu *vcpu;
	struct share share;
	pthread_t thread;
	pid_t tid;
	bool in_flight, in_stage2;
};

struct keeper_options options = { .keep = true, .quirk_disable = true, .hold_ns = MS(1000) };
const char *const populate_names[3] = { "auto", "all", "resident" };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed; /* anything below; waits by CLOCK_MONOTONIC */

static int vm_fd = -1;
static bool capable; /* the kernel has the ioctl, and nested paging */
static enum { QUIRK_UNDECIDED, QUIRK_ABSENT, QUIRK_KEPT, QUIRK_VFIO, QUIRK_DISABLED } quirk;
static const char *const quirk_names[] = { "undecided", "absent", "kept", "vfio", "disabled" };
static bool vfio, paused, incoming;
static int userfaults;

static struct vcpu vcpus[MAX_VCPUS];
static atomic_size_t vcpu_count;
static __thread struct vcpu *this_vcpu;

static struct slot *slots;
static size_t slot_count, slot_room;
static struct piece *pieces;
static size_t piece_count, piece_room;

static atomic_bool work;	/* some piece is ready to be taken: see before_run() */
static atomic_int changing;	/* a slot is being changed: stay out of the ioctl */
static int in_flight;		/* vCPUs in a system call for us */
static bool guest_started; /* it was let run; some vCPU may still be on its way: */
static bool guest_entered;
static atomic_uint_least64_t zaps; /* of everything, by KVM */
static uint64_t held_since;	/* when the guest began to wait for us; 0: it has not */
static uint64_t slot_changed_at;

static struct {
	struct batch_worker *workers;
	size_t count, running;
	uint64_t chunk_bytes, started, ended;
	atomic_bool abort;
} batch;

static struct {
	uint64_t created, deleted, stuck, errors;
	uint64_t populated, prefaulted, again;
	uint64_t populate_ns, prefault_ns, again_ns;
} counters;

// -- events --------------------------------------------------------------------------------

static char events[EVENTS][EVENT_LENGTH];
static uint64_t event_count;

static void event(const char *name, const char *why, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* The format is of further fields, each with a comma before it. The lock is held. */
static void event(const char *name, const char *why, const char *format, ...)
{
	char *line = events[event_count % EVENTS];
	struct timespec now;
	va_list arguments;
	int length;

	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(line, EVENT_LENGTH, "{\"event\":\"%s\",\"time\":%lld.%03ld", name,
			  (long long)now.tv_sec, now.tv_nsec / 1000000);
	if (why)
		length += snprintf(line + length, EVENT_LENGTH - (size_t)length,
				   ",\"why\":\"%s\"", why);
	va_start(arguments, format);
	length += vsnprintf(line + length, EVENT_LENGTH - (size_t)length, format, arguments);
	va_end(arguments);
	if (length < EVENT_LENGTH - 1)
		strcpy(line + length, "}");
	event_count++;
	pthread_cond_broadcast(&changed);
	if (options.log)
		fprintf(stderr, "qemu-prefault: %s\n", line);
}

uint64_t keeper_last_event(void)
{
	pthread_mutex_lock(&lock);
	uint64_t count = event_count;

	pthread_mutex_unlock(&lock);
	return count;
}

static struct timespec in_future(uint64_t ns)
{
	struct timespec when;

	clock_gettime(CLOCK_MONOTONIC, &when);
	ns += (uint64_t)when.tv_nsec;
	when.tv_sec += (time_t)(ns / 1000000000);
	when.tv_nsec = (long)(ns % 1000000000);
	return when;
}

bool keeper_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms)
{
	struct timespec until = in_future(MS(timeout_ms));
	bool found;

	pthread_mutex_lock(&lock);
	while (event_count == *sequence)
		if (pthread_cond_timedwait(&changed, &lock, &until))
			break;
	found = event_count != *sequence;
	if (found) {
		if (event_count - *sequence > EVENTS)
			*sequence = event_count - EVENTS;
		snprintf(line, size, "%s", events[(*sequence)++ % EVENTS]);
	}
	pthread_mutex_unlock(&lock);
	return found;
}

// -- slots and pieces ----------------------------------------------------------------------

static struct slot *find_slot(uint32_t id)
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

static struct slot *slot_at_hva(uint64_t hva)
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

static void add_piece(struct piece piece)
{
	if (!piece.size || !(piece.populate || piece.stage2))
		return;
	if (!grow((void **)&pieces, &piece_room, piece_count, sizeof(*pieces))) {
		counters.errors++;
		return;
	}
	pieces[piece_count++] = piece;
}

static void drop_pieces(uint32_t slot)
{
	size_t kept = 0;

	for (size_t i = 0; i < piece_count; i++)
		if (pieces[i].slot != slot)
			pieces[kept++] = pieces[i];
	piece_count = kept;
}

static const char *held_reason(void)
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
static bool firmware_at_work(void)
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
static bool firmware_copies_itself(void)
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
static void update_work(void)
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
static void queue_slot(struct slot *slot)
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
static void undefer(const char *why)
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

/* By QEMU's own SIG_IPI; in a program that does not handle it, it would be the end. */
static void interrupt(pid_t tid)
{
	struct sigaction action;

	if (tid && !sigaction(SIGUSR1, NULL, &action) && action.sa_handler != SIG_DFL &&
	    action.sa_handler != SIG_IGN)
		syscall(SYS_tgkill, getpid(), tid, SIGUSR1);
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

// -- doing it ------------------------------------------------------------------------------

/* Whoever changes a slot waits for this. The lock is held. */
static void leave_ioctl(void)
{
	in_flight--;
	pthread_cond_broadcast(&changed);
}

/* A vCPU thread at work, from coming until it enters the guest. */
struct turn {
	struct vcpu *vcpu;
	uint64_t deadline; /* 0: none */
	uint64_t populated, prefaulted; /* bytes */
	bool in_ioctl, again;
};

static int turn_goes_on(void *context)
{
	const struct turn *turn = context;

	if (turn->vcpu->run->immediate_exit || atomic_load(&changing))
		return 0;
	return !turn->deadline || prefault_now_ns() < turn->deadline;
}

/* Only the ioctl can fail to come back. */
static void note_start(void *context)
{
	const struct turn *turn = context;

	atomic_store(&turn->vcpu->busy_since, turn->in_ioctl ? prefault_now_ns() : 0);
}

/* Take up to a chunk of the first piece that may be done now. The lock is held. */
static bool take(struct piece *taken)
{
	uint64_t end = firmware_copies_itself() ? MIB(1) : UINT64_MAX;

	for (size_t i = 0; i < piece_count; i++) {
		struct piece *piece = &pieces[i];

		if (piece->deferred || piece->gpa >= end)
			continue;
		*taken = *piece;
		if (taken->size > end - taken->gpa)
			taken->size = end - taken->gpa;
		/* Cut where huge pages end, so that none is worked on from two sides. */
		if (taken->size > CHUNK)
			taken->size = CHUNK - (taken->hva + CHUNK) % MIB(2);
		/* Its populating was queued apart, and may yet be to come: never the ioctl first. */
		uint64_t from, length;

		if (taken->stage2 && !taken->resident &&
		    memory_unmarked(MEMORY_POPULATED, taken->hva, taken->size, &from, &length))
			taken->populate = true;
		piece->gpa += taken->size;
		piece->hva += taken->size;
		piece->size -= taken->size;
		if (!piece->size) {
			memmove(piece, piece + 1, (--piece_count - i) * sizeof(*piece));
			update_work();
		}
		return true;
	}
	return false;
}

/* What is left of a chunk goes to the front of the queue. The lock is held. */
static void put_back(struct piece piece, uint64_t done)
{
	piece.gpa += done;
	piece.hva += done;
	piece.size -= done;
	if (!piece.size || !find_slot(piece.slot) ||
	    !grow((void **)&pieces, &piece_room, piece_count, sizeof(*pieces)))
		return;
	memmove(pieces + 1, pieces, piece_count++ * sizeof(*pieces));
	pieces[0] = piece;
	update_work();
}

static void run_range(struct prefault_range *range, struct turn *turn)
{
	const struct prefault_limits limits = { .chunk_bytes = CHUNK, .stuck_ns = STUCK };
	const struct prefault_hooks hooks = { turn_goes_on, note_start, turn };

	turn->in_ioctl = range->kind == PREFAULT_STAGE2;
	if (turn_goes_on(turn))
		prefault_run_range(range, turn->vcpu->fd, &limits, &hooks);
	else
		range->error = PREFAULT_ABORTED;
}

/* Bytes of the piece that were mapped, *error as the ioctl's. Of a resident-only piece
 * what is absent counts as done. */
static uint64_t run_stage2(const struct piece *piece, struct turn *turn,
			   uint64_t *mapped, int *error)
{
	uint64_t at = 0;

	*mapped = 0;
	*error = 0;
	while (at < piece->size && !*error) {
		uint64_t start = piece->hva + at, length = piece->size - at;

		if (piece->resident) {
			pthread_mutex_lock(&lock);
			bool found = memory_next_resident(&start, piece->hva + piece->size,
							  &length);
			pthread_mutex_unlock(&lock);
			if (!found)
				return piece->size;
		}
		struct prefault_range range = { .start = piece->gpa + (start - piece->hva),
						.size = length,
						.kind = PREFAULT_STAGE2 };

		run_range(&range, turn);
		at = start - piece->hva + range.done;
		*mapped += range.done;
		*error = range.error;
	}
	return at;
}

/* From now on only what is resident, for all of the slot. The lock is held. */
static void make_resident_only(struct slot *slot)
{
	slot->resident_only = true;
	for (size_t i = 0; i < piece_count;) {
		struct piece *piece = &pieces[i];

		if (piece->slot == slot->id) {
			piece->resident = true;
			piece->populate = false;
			if (!piece->stage2) {
				memmove(piece, piece + 1, (--piece_count - i) * sizeof(*piece));
				continue;
			}
		}
		i++;
	}
	update_work();
}

/* One chunk: populate, then prefault. The lock is held, but not while it works. */
static void run_chunk(struct piece piece, struct turn *turn)
{
	struct vcpu *self = turn->vcpu;
	struct prefault_range populate = { .start = piece.hva, .size = piece.size,
					   .kind = PREFAULT_POPULATE };
	uint64_t started = prefault_now_ns(), populated_at, ended, mapped = 0, done = 0;
	int error = 0;
	bool no_memory = piece.populate && guest_entered &&
			 !(memory_facts(piece.hva, piece.size) & MEMORY_HUGETLB) &&
			 memory_headroom() < 4 * CHUNK;

	in_flight++;
	self->in_hand = piece;
	pthread_mutex_unlock(&lock);
	if (piece.populate) {
		if (no_memory)
			populate.error = ENOMEM;
		else
			run_range(&populate, turn);
		piece.size = populate.done; /* the rest is put back as it was */
	}
	populated_at = prefault_now_ns();
	if (piece.stage2 && piece.size)
		done = run_stage2(&piece, turn, &mapped, &error);
	ended = prefault_now_ns();
	atomic_store(&self->busy_since, 0);
	pthread_mutex_lock(&lock);
	self->in_hand.size = 0;
	leave_ioctl();

	struct slot *slot = find_slot(piece.slot);
	uint64_t from, length;
	bool again = mapped && !memory_unmarked(MEMORY_PREFAULTED, piece.hva, done, &from, &length);

	memory_set_mark(MEMORY_PREFAULTED, piece.hva, done);
	turn->populated += populate.done;
	turn->prefaulted += mapped;
	turn->again |= again;
	counters.populated += populate.done;
	counters.populate_ns += populated_at - started;
	counters.prefaulted += mapped;
	counters.prefault_ns += ended - populated_at;
	if (again) {
		counters.again += mapped;
		counters.again_ns += ended - populated_at;
	}
	if (slot)
		slot->prefaulted += mapped;
	if (piece.populate) {
		struct piece rest = piece;

		memory_set_mark(MEMORY_POPULATED, piece.hva, populate.done);
		rest.size = populate.size;
		if (populate.error == PREFAULT_ABORTED) {
			put_back(rest, populate.done);
		} else if (populate.error) {
			counters.errors++;
			event("error", "populate", ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu",
			      populate.error, (unsigned long long)(piece.gpa + populate.done),
			      (unsigned long long)(rest.size - populate.done));
			if (slot) /* what is there is prefaulted all the same */
				make_resident_only(slot);
		}
		piece.populate = false;
	}
	if (!piece.stage2 || done >= piece.size)
		return;
	if (error == PREFAULT_ABORTED || error == PREFAULT_STUCK || error == EOPNOTSUPP) {
		put_back(piece, done);
		if (error == PREFAULT_ABORTED && (done || ended - populated_at < STUCK))
			return;
		/* The vCPU is the matter: let it go through the guest, or let others do it. */
		self->stuck = true;
		self->retry_at = ended + QUIET;
		counters.stuck++;
		event("stuck", error == EOPNOTSUPP ? "guest mode" : "no progress",
		      ",\"vcpu\":%lu", self->id);
	} else if (error) {
		counters.errors++;
		if (slot && (error == EFAULT || error == ENOENT)) {
			drop_pieces(slot->id); /* no RAM after all */
			slot->state = SLOT_SKIPPED;
			slot->why = "not prefaultable";
			update_work();
		}
		event("error", "prefault", ",\"errno\":%d,\"gpa\":%llu,\"size\":%llu", error,
		      (unsigned long long)(piece.gpa + done),
		      (unsigned long long)(piece.size - done));
	}
}

/*
 * A vCPU whose root is obsolete must go through the guest before it prefaults again:
 * before commit 20a6cff3b283 (v6.15) the ioctl retries for ever on it.
 */
static bool usable(const struct vcpu *self)
{
	return !self->stuck && prefault_now_ns() >= self->retry_at &&
	       (self->fresh || self->zaps_seen == atomic_load(&zaps));
}

/* In SMM and in guest mode other tables are loaded. Known only since it last came back. */
static bool on_own_tables(const struct vcpu *self)
{
	return !(self->run->flags & (RUN_SMM | RUN_GUEST_MODE));
}

static uint64_t pending_bytes(void)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < piece_count; i++)
		bytes += pieces[i].stage2 ? pieces[i].size : 0;
	for (size_t i = 0; i < vcpu_count; i++)
		bytes += vcpus[i].in_hand.stage2 ? vcpus[i].in_hand.size : 0;
	return bytes;
}

/* Once, when everything is known and nothing is prefaulted yet. */
static void decide_quirk(void)
{
	struct kvm_enable_cap cap = { .cap = CAP_DISABLE_QUIRKS2, .args = { QUIRK_SLOT_ZAP_ALL } };
	long known = raw_ioctl(vm_fd, KVM_CHECK_EXTENSION, (void *)CAP_DISABLE_QUIRKS2);

	if (known < 0 || !(known & QUIRK_SLOT_ZAP_ALL))
		quirk = QUIRK_ABSENT;
	else if (vfio)
		quirk = QUIRK_VFIO;
	else if (!options.quirk_disable || raw_ioctl(vm_fd, KVM_ENABLE_CAP, &cap))
		quirk = QUIRK_KEPT;
	else
		quirk = QUIRK_DISABLED;
	event("quirk", quirk_names[quirk], ",\"name\":\"KVM_X86_QUIRK_SLOT_ZAP_ALL\"");
}

/* Populating is spending: if the host cannot give that much, prefault what is there. */
static void check_headroom(void)
{
	uint64_t wanted = 0, left = memory_headroom();

	for (size_t i = 0; i < piece_count; i++) {
		const struct piece *piece = &pieces[i];

		if (!piece->populate || (memory_facts(piece->hva, piece->size) & MEMORY_HUGETLB))
			continue;
		wanted += piece->size - memory_present(piece->hva, piece->size);
	}
	if (wanted <= left)
		return;
	fprintf(stderr,
		"qemu-prefault: populating needs %llu MiB, the host or the cgroup has %llu MiB: "
		"only present pages are prefaulted\n",
		(unsigned long long)wanted >> 20, (unsigned long long)left >> 20);
	event("held", "no memory to populate", ",\"bytes\":%llu", (unsigned long long)wanted);
	options.populate = POPULATE_RESIDENT;
	for (size_t i = 0; i < slot_count; i++)
		if (slots[i].state == SLOT_KEPT)
			queue_slot(&slots[i]);
}

static void start_guest(void)
{
	guest_started = true;
	if (options.keep && capable)
		decide_quirk();
	for (size_t i = 0; i < slot_count; i++) /* facts may have come after the slots */
		if (slots[i].state == SLOT_KEPT)
			queue_slot(&slots[i]);
	if (options.keep && capable)
		check_headroom();
	slot_changed_at = prefault_now_ns();
	update_work();
	event("first-run", NULL, ",\"bytes\":%llu", (unsigned long long)pending_bytes());
}

/* What was done since the guest last ran, in one event; QEMU's kicks may have cut it in parts. */
static struct {
	uint64_t populated, prefaulted;
	double seconds; /* of vCPU threads */
	bool again;
} episode;

static void tell_episode(bool started)
{
	if (episode.populated || episode.prefaulted)
		event("prefaulted",
		      !started	    ? "before the first instruction" :
		      episode.again ? "tables had been dropped" :
				      "new memory",
		      ",\"bytes\":%llu,\"populated\":%llu,\"seconds\":%.6f,\"pending\":%llu",
		      (unsigned long long)episode.prefaulted,
		      (unsigned long long)episode.populated, episode.seconds,
		      (unsigned long long)pending_bytes());
	memset(&episode, 0, sizeof(episode));
}

/*
 * Work until there is none, or the guest has waited long enough: without limit before its
 * first instruction (it has not begun to wait), else for options.hold_ns, then in slices.
 */
static void before_run(struct vcpu *self)
{
	pthread_mutex_lock(&lock);
	if (!guest_started)
		start_guest();
	if (!firmware_at_work())
		undefer("firmware has left low memory alone");

	uint64_t now = prefault_now_ns();
	struct turn turn = { .vcpu = self };
	struct piece piece;
	bool first = !self->started && !incoming;

	if (!held_since && on_own_tables(self)) /* else it is not kept waiting */
		held_since = now;
	if (!first)
		turn.deadline = (held_since ? held_since : now) + options.hold_ns;
	if (turn.deadline && turn.deadline < now + SLICE) {
		if (now - self->slice_ended < SLICE_EVERY) {
			pthread_mutex_unlock(&lock);
			return;
		}
		turn.deadline = now + SLICE;
	}
	while (usable(self) && on_own_tables(self) && !self->run->immediate_exit &&
	       (!turn.deadline || prefault_now_ns() < turn.deadline)) {
		bool was_fresh = self->fresh;

		if (!atomic_load(&changing) && atomic_load(&work) && take(&piece)) {
			run_chunk(piece, &turn);
			if (was_fresh) {
				self->fresh = false;
				self->zaps_seen = atomic_load(&zaps);
			}
		} else if (first && (in_flight || atomic_load(&changing))) {
			/* Nobody runs ahead of what others still have in hand. */
			struct timespec soon = in_future(MS(2));

			pthread_cond_timedwait(&changed, &lock, &soon);
		} else {
			break;
		}
	}
	bool starting = !self->started;

	self->slice_ended = prefault_now_ns();
	if (starting && !self->run->immediate_exit) {
		self->started = guest_entered = true;
		slot_changed_at = prefault_now_ns();
	}
	episode.seconds += (double)(self->slice_ended - now) / 1e9;
	episode.prefaulted += turn.prefaulted;
	episode.populated += turn.populated;
	episode.again |= turn.again;
	if (!atomic_load(&work) || self->started)
		tell_episode(!starting);
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static struct vcpu *find_vcpu(int fd)
{
	if (this_vcpu && this_vcpu->fd == fd)
		return this_vcpu;
	for (size_t i = 0; i < vcpu_count; i++)
		if (vcpus[i].fd == fd) {
			vcpus[i].tid = (pid_t)syscall(SYS_gettid);
			this_vcpu = &vcpus[i];
			return this_vcpu;
		}
	return NULL;
}

long keeper_run_vcpu(int fd)
{
	struct vcpu *self = find_vcpu(fd);

	if (!self || !self->run)
		return raw_ioctl(fd, KVM_RUN, NULL);
	/* QEMU also calls KVM_RUN to complete an exit, and to have a signal eaten. */
	if (!self->run->immediate_exit) {
		if (!self->started || atomic_load(&work))
			before_run(self);
	}

	uint64_t zaps_now = atomic_load(&zaps);

	atomic_store(&self->in_guest, true);
	long result = raw_ioctl(fd, KVM_RUN, NULL);

	atomic_store(&self->in_guest, false);
	if (!result) { /* it was in the guest, and so through what KVM had asked of it */
		self->started = true;
		self->fresh = false;
		self->zaps_seen = zaps_now;
		self->stuck = false;
	}
	return result;
}

// -- what QEMU does ------------------------------------------------------------------------

void keeper_vcpu_created(int fd, unsigned long id)
{
	pthread_mutex_lock(&lock);
	size_t at = vcpu_count;

	if (at < MAX_VCPUS) {
		struct vcpu *vcpu = &vcpus[at];
		void *run = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);

		*vcpu = (struct vcpu){ .fd = fd, .id = id, .fresh = true,
				       .run = run == MAP_FAILED ? NULL : run };
		vcpu_count = at + 1;
	}
	pthread_mutex_unlock(&lock);
}

void keeper_vfio_seen(void)
{
	pthread_mutex_lock(&lock);
	vfio = true;
	if (quirk == QUIRK_DISABLED)
		fprintf(stderr, "qemu-prefault: a VFIO device came after "
				"KVM_X86_QUIRK_SLOT_ZAP_ALL was disabled, which cannot be undone; "
				"start QEMU with quirk=keep for such guests\n");
	pthread_mutex_unlock(&lock);
}

void keeper_userfault(bool registered)
{
	pthread_mutex_lock(&lock);
	const char *before = held_reason();

	userfaults += registered ? 1 : -1;
	if (userfaults < 0)
		userfaults = 0;
	update_work();
	if (before != held_reason())
		event(before ? "released" : "held", "userfaultfd", "%s", "");
	pthread_mutex_unlock(&lock);
}

void keeper_learn_memory(void)
{
	pthread_mutex_lock(&lock);
	memory_learn();
	pthread_mutex_unlock(&lock);
}

void keeper_mapped(uint64_t start, uint64_t size, int fd, int flags)
{
	pthread_mutex_lock(&lock);
	memory_mapped(start, size, fd, flags);
	pthread_mutex_unlock(&lock);
}

void keeper_discarded(uint64_t start, uint64_t size)
{
	pthread_mutex_lock(&lock);
	if (!(memory_facts(start, size) & MEMORY_HOLES)) {
		struct slot *slot = slot_at_hva(start);

		if (slot)
			memory_discarded(slot->hva, slot->size);
		else
			memory_discarded(start, size);
		if (slot && options.populate == POPULATE_AUTO)
			make_resident_only(slot);
	}
	pthread_mutex_unlock(&lock);
}

void keeper_file_discarded(int fd)
{
	pthread_mutex_lock(&lock);
	if (memory_file_discarded(fd) && options.populate == POPULATE_AUTO)
		for (size_t i = 0; i < slot_count; i++)
			if (!slots[i].resident_only &&
			    memory_facts(slots[i].hva, slots[i].size) & MEMORY_HOLES)
				make_resident_only(&slots[i]);
	pthread_mutex_unlock(&lock);
}

/* virtio-mem with prealloc=on has plugged a block, or a backend was preallocated. */
void keeper_populated_by_qemu(uint64_t start, uint64_t size)
{
	pthread_mutex_lock(&lock);
	struct slot *slot = slot_at_hva(start);

	if (slot && slot->state == SLOT_KEPT && guest_started && slot->resident_only) {
		uint64_t length = slot->hva + slot->size - start;

		add_piece((struct piece){ .gpa = slot->gpa + (start - slot->hva), .hva = start,
					  .size = size < length ? size : length,
					  .slot = slot->id, .stage2 = true, .resident = true });
		held_since = 0;
		update_work();
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
}

// -- the control socket's orders -----------------------------------------------------------

void keeper_pause(bool wanted)
{
	pthread_mutex_lock(&lock);
	paused = wanted;
	if (!wanted) {
		options.keep = true;
		if (guest_started && capable && quirk == QUIRK_UNDECIDED)
			decide_quirk();
		for (size_t i = 0; i < slot_count; i++)
			if (slots[i].state == SLOT_KEPT)
				queue_slot(&slots[i]);
	}
	event(wanted ? "held" : "released", "asked for", "%s", "");
	update_work();
	pthread_mutex_unlock(&lock);
}

void keeper_set_populate(enum populate populate)
{
	pthread_mutex_lock(&lock);
	options.populate = populate;
	pthread_mutex_unlock(&lock);
}

uint64_t keeper_prefault_all(void)
{
	uint64_t bytes;

	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < slot_count; i++)
		if (slots[i].state == SLOT_KEPT)
			queue_slot(&slots[i]);
	bytes = pending_bytes();
	update_work();
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return bytes;
}

static bool has_piece(uint32_t slot)
{
	for (size_t i = 0; i < piece_count; i++)
		if (pieces[i].slot == slot && pieces[i].size)
			return true;
	for (size_t i = 0; i < vcpu_count; i++)
		if (vcpus[i].in_hand.slot == slot && vcpus[i].in_hand.size)
			return true;
	return false;
}

static const char *slot_state(const struct slot *slot)
{
	if (slot->state == SLOT_SKIPPED)
		return "skipped";
	if (slot->state == SLOT_HELD)
		return "held";
	return !guest_started || has_piece(slot->id) ? "pending" : "done";
}

static void print_text(FILE *out, const char *name, const char *text)
{
	if (text)
		fprintf(out, ",\"%s\":\"%s\"", name, text);
	else
		fprintf(out, ",\"%s\":null", name);
}

static const char *json_bool(bool value)
{
	return value ? "true" : "false";
}

void keeper_status(FILE *out)
{
	pthread_mutex_lock(&lock);
	fprintf(out,
		"{\"plugin\":1,\"pid\":%d,\"loaded_by\":\"%s\",\"kvm\":%s,\"pre_fault_memory\":%s,"
		"\"keeping\":%s,\"populate\":\"%s\",\"quirk\":\"%s\"",
		getpid(), options.by_preload ? "preload" : "plugin", json_bool(vm_fd >= 0),
		json_bool(capable), json_bool(options.keep && !paused),
		populate_names[options.populate], quirk_names[quirk]);
	print_text(out, "held", held_reason());
	fprintf(out, ",\"vcpus\":[");
	for (size_t i = 0; i < vcpu_count; i++)
		fprintf(out, "%s{\"id\":%lu,\"fd\":%d,\"tid\":%d,\"running\":%s}", i ? "," : "",
			vcpus[i].id, vcpus[i].fd, vcpus[i].tid,
			json_bool(atomic_load(&vcpus[i].in_guest)));
	fprintf(out, "],\"slots\":[");
	for (size_t i = 0; i < slot_count; i++) {
		const struct slot *slot = &slots[i];

		fprintf(out,
			"%s{\"slot\":%u,\"as\":%u,\"gpa\":%llu,\"size\":%llu,\"hva\":%llu,"
			"\"flags\":%u,\"state\":\"%s\",\"resident_only\":%s,\"prefaulted\":%llu",
			i ? "," : "", slot->id & 0xffff, slot->id >> 16,
			(unsigned long long)slot->gpa, (unsigned long long)slot->size,
			(unsigned long long)slot->hva, slot->flags, slot_state(slot),
			json_bool(slot->resident_only), (unsigned long long)slot->prefaulted);
		print_text(out, "why", slot->why);
		fprintf(out, "}");
	}
	fprintf(out,
		"],\"pending\":%llu,\"counters\":{\"slots_created\":%llu,\"slots_deleted\":%llu,"
		"\"populated\":%llu,\"prefaulted\":%llu,\"again\":%llu,\"stuck\":%llu,"
		"\"errors\":%llu,\"populate_seconds\":%.6f,\"prefault_seconds\":%.6f,"
		"\"again_seconds\":%.6f}}",
		(unsigned long long)pending_bytes(), (unsigned long long)counters.created,
		(unsigned long long)counters.deleted, (unsigned long long)counters.populated,
		(unsigned long long)counters.prefaulted, (unsigned long long)counters.again,
		(unsigned long long)counters.stuck, (unsigned long long)counters.errors,
		(double)counters.populate_ns / 1e9, (double)counters.prefault_ns / 1e9,
		(double)counters.again_ns / 1e9);
	pthread_mutex_unlock(&lock);
}

// -- batches from outside ------------------------------------------------------------------

/* Between two chunks; stands aside while a slot is changed. */
static int batch_goes_on(void *context)
{
	struct batch_worker *worker = context;
	bool go_on;

	pthread_mutex_lock(&lock);
	if (worker->in_flight) {
		worker->in_flight = false;
		leave_ioctl();
	}
	while (atomic_load(&changing))
		pthread_cond_wait(&changed, &lock);
	/* The ioctl would wait for a vCPU in the guest; populating need not. */
	go_on = !atomic_load(&batch.abort) &&
		!(worker->in_stage2 && atomic_load(&worker->vcpu->in_guest));
	if (go_on) {
		worker->in_flight = true;
		in_flight++;
	}
	pthread_mutex_unlock(&lock);
	return go_on;
}

static void nothing(void *context)
{
	(void)context;
}

static void *run_share(void *context)
{
	struct batch_worker *worker = context;
	struct vcpu *vcpu = worker->vcpu;
	const struct prefault_limits limits = { .chunk_bytes = batch.chunk_bytes,
						.stuck_ns = STUCK };
	const struct prefault_hooks hooks = { batch_goes_on, nothing, worker };
	uint64_t mapped = 0, populated = 0;

	pthread_mutex_lock(&lock);
	worker->tid = (pid_t)syscall(SYS_gettid);
	bool stale = !vcpu->fresh && vcpu->zaps_seen != atomic_load(&zaps);

	pthread_mutex_unlock(&lock);
	for (size_t i = 0; i < worker->share.count; i++) {
		struct prefault_range *range = &worker->share.ranges[i];

		if (range->kind == PREFAULT_STAGE2 && stale) {
			range->error = PREFAULT_STUCK; /* see usable() */
			continue;
		}
		worker->in_stage2 = range->kind == PREFAULT_STAGE2;
		prefault_run_range(range, vcpu->fd, &limits, &hooks);
		if (range->error == PREFAULT_ABORTED && !atomic_load(&batch.abort))
			range->error = EBUSY;
		*(range->kind == PREFAULT_STAGE2 ? &mapped : &populated) += range->done;
		if (range->kind == PREFAULT_POPULATE) {
			pthread_mutex_lock(&lock);
			memory_set_mark(MEMORY_POPULATED, range->start, range->done);
			pthread_mutex_unlock(&lock);
		}
	}
	pthread_mutex_lock(&lock);
	if (worker->in_flight)
		leave_ioctl();
	if (mapped && vcpu->fresh) {
		vcpu->fresh = false;
		vcpu->zaps_seen = atomic_load(&zaps);
	}
	counters.prefaulted += mapped;
	counters.populated += populated;
	if (!--batch.running)
		batch.ended = prefault_now_ns();
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return NULL;
}

size_t keeper_vcpu_count(void)
{
	return vcpu_count;
}

const char *keeper_start_batch(struct share *shares, size_t count, uint64_t chunk_bytes)
{
	const char *problem = NULL;
	sigset_t mask, before;

	sigfillset(&mask);
	sigdelset(&mask, SIGUSR1); /* see interrupt(); QEMU's handler finds no vCPU in this thread */
	pthread_mutex_lock(&lock);
	if (batch.workers) {
		pthread_mutex_unlock(&lock);
		return "another batch is at work";
	}
	batch.workers = calloc(count, sizeof(*batch.workers));
	batch.count = batch.running = 0;
	batch.chunk_bytes = chunk_bytes;
	batch.started = prefault_now_ns();
	atomic_store(&batch.abort, false);
	pthread_sigmask(SIG_SETMASK, &mask, &before);
	for (size_t i = 0; batch.workers && i < count; i++) {
		struct batch_worker *worker = &batch.workers[batch.count];

		if (!shares[i].count)
			continue;
		worker->vcpu = &vcpus[i];
		worker->share = shares[i];
		if (pthread_create(&worker->thread, NULL, run_share, worker)) {
			problem = "no thread could be started";
			atomic_store(&batch.abort, true);
			break;
		}
		pthread_setname_np(worker->thread, "prefault-batch");
		batch.count++;
		batch.running++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!batch.workers)
		problem = "out of memory";
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	if (problem && batch.workers)
		keeper_end_batch();
	return problem;
}

bool keeper_batch_done(uint64_t *bytes, double *seconds)
{
	pthread_mutex_lock(&lock);
	bool done = !batch.running;

	*bytes = 0;
	for (size_t i = 0; i < batch.count; i++)
		for (size_t j = 0; j < batch.workers[i].share.count; j++)
			*bytes += __atomic_load_n(&batch.workers[i].share.ranges[j].done,
						  __ATOMIC_RELAXED);
	*seconds = (double)((done && batch.count ? batch.ended : prefault_now_ns()) -
			    batch.started) / 1e9;
	pthread_mutex_unlock(&lock);
	return done;
}

void keeper_abort_batch(void)
{
	atomic_store(&batch.abort, true);
}

void keeper_end_batch(void)
{
	for (size_t i = 0; i < batch.count; i++)
		pthread_join(batch.workers[i].thread, NULL);
	pthread_mutex_lock(&lock);
	free(batch.workers);
	batch.workers = NULL;
	batch.count = 0;
	pthread_mutex_unlock(&lock);
}

// -- the keeper's own thread ---------------------------------------------------------------

/*
 * It does no work itself. It gets vCPUs out of the guest when there is work and none comes
 * by itself, out of an ioctl that does not end, and tells when slots have been quiet.
 */
static void *keep_watch(void *unused)
{
	uint64_t kicked_at = 0;

	(void)unused;
	pthread_mutex_lock(&lock);
	for (;;) {
		uint64_t now = prefault_now_ns();
		bool deferred = false;

		for (size_t i = 0; i < piece_count; i++)
			deferred |= pieces[i].deferred;
		if (!(atomic_load(&work) || (deferred && guest_entered) || in_flight ||
		      batch.running)) {
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		for (size_t i = 0; i < vcpu_count; i++) {
			uint64_t since = atomic_load(&vcpus[i].busy_since);

			if (since && now > since + STUCK)
				interrupt(vcpus[i].tid);
		}
		/* A batch waits for a vCPU that was resumed, or in an ioctl that does not end. */
		for (size_t i = 0; batch.running && i < batch.count; i++) {
			interrupt(batch.workers[i].tid);
			if (batch.workers[i].in_stage2 &&
			    atomic_load(&batch.workers[i].vcpu->in_guest))
				interrupt(batch.workers[i].vcpu->tid);
		}
		if (deferred && guest_entered && !held_reason() && now > slot_changed_at + QUIET)
			undefer("slots have been quiet");
		bool kicked = false;

		if (atomic_load(&work) && !in_flight && !atomic_load(&changing) &&
		    now > kicked_at + SLICE_EVERY) {
			for (size_t i = 0; i < vcpu_count; i++)
				if (atomic_load(&vcpus[i].in_guest) && usable(&vcpus[i])) {
					interrupt(vcpus[i].tid);
					kicked = true;
				}
			kicked_at = now;
		}
		struct timespec soon = in_future(kicked || in_flight ? SLICE_EVERY : MS(100));

		pthread_cond_timedwait(&changed, &lock, &soon);
	}
	return NULL;
}

/* QEMU's command line tells what no ioctl does: its first KVM_RUN is somebody's blackout. */
static bool has_argument(const char *wanted)
{
	char *line = NULL;
	size_t room = 0;
	bool found = false;
	FILE *file = fopen("/proc/self/cmdline", "re");

	while (file && !found && getdelim(&line, &room, '\0', file) > 0)
		found = !strcmp(line[0] == '-' && line[1] == '-' ? line + 1 : line, wanted);
	free(line);
	if (file)
		fclose(file);
	return found;
}

bool start_thread(pthread_t *thread, const char *name, void *(*function)(void *))
{
	sigset_t all, before;
	bool started;

	sigfillset(&all); /* QEMU's signals are for QEMU's threads */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	started = !pthread_create(thread, NULL, function, NULL);
	if (started)
		pthread_setname_np(*thread, name);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return started;
}

void keeper_vm_created(int fd)
{
	pthread_condattr_t monotonic;
	pthread_t thread;

	pthread_mutex_lock(&lock);
	if (vm_fd >= 0) { /* one VM in a process; a second one is left alone */
		pthread_mutex_unlock(&lock);
		return;
	}
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&changed, &monotonic);
	vm_fd = fd;
	capable = raw_ioctl(fd, KVM_CHECK_EXTENSION, (void *)CAP_PRE_FAULT_MEMORY) == 1;
	if (!capable)
		fprintf(stderr, "qemu-prefault: this KVM has no KVM_PRE_FAULT_MEMORY (Linux 6.11, "
				"and EPT or NPT enabled): nothing will be prefaulted\n");
	incoming = has_argument("-incoming");
	memory_open();
	if (!start_thread(&thread, "prefault", keep_watch))
		fprintf(stderr, "qemu-prefault: no thread could be started\n");
	if (!options.socket_off)
		control_start();
	pthread_mutex_unlock(&lock);
}
