// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "keeper_state.h"

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control_socket.h"
#include "host_memory.h"

// Spelt out: a distribution's headers may be older.
#define CAP_DISABLE_QUIRKS2 213
#define CAP_PRE_FAULT_MEMORY 236
#define QUIRK_SLOT_ZAP_ALL (1u << 7) /* Linux 6.12 */
#define RUN_SMM (1u << 0)
#define RUN_GUEST_MODE (1u << 2) /* 85542adb65ec, Linux 6.11 */

#define CHUNK MIB(8) /* between two looks at whether somebody wants the vCPU */
#define SLICE MS(2)  /* work at one go when the guest has waited long enough */
#define SLICE_EVERY MS(10)

struct keeper_options options = { .keep = true, .quirk_disable = true, .hold_ns = MS(1000) };

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed;

int vm_fd = -1;
bool capable;
enum quirk quirk;
const char *const quirk_names[] = { "undecided", "absent", "kept", "vfio", "disabled" };
bool paused, incoming;
static bool vfio;
int userfaults;

struct vcpu vcpus[MAX_VCPUS];
atomic_size_t vcpu_count;
static __thread struct vcpu *this_vcpu;

atomic_bool work;
atomic_int changing;
int in_flight;
static atomic_int at_work; /* vCPUs with a piece in hand */
bool guest_started, guest_entered;
atomic_uint_least64_t zaps;
struct counters counters;

/* By QEMU's own SIG_IPI; in a program that does not handle it, it would be the end. */
void interrupt(pid_t tid)
{
	struct sigaction action;

	if (tid && !sigaction(SIGUSR1, NULL, &action) && action.sa_handler != SIG_DFL &&
	    action.sa_handler != SIG_IGN)
		syscall(SYS_tgkill, getpid(), tid, SIGUSR1);
}

/* Whoever changes a slot waits for this. The lock is held. */
void leave_ioctl(void)
{
	in_flight--;
	pthread_cond_broadcast(&changed);
}

// -- doing it ------------------------------------------------------------------------------

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
			remove_piece(i);
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
	if (!find_slot(piece.slot))
		return;
	put_first(piece);
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
	atomic_fetch_add(&at_work, 1);
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
	atomic_fetch_sub(&at_work, 1);
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

/* Once, when everything is known and nothing is prefaulted yet. */
void decide_quirk(void)
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
	bool first = !self->started && !incoming, sliced = false;

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
		sliced = true;
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
		} else if (first ? in_flight || atomic_load(&changing) :
				   !sliced && atomic_load(&at_work)) {
			/*
			 * Nobody runs ahead of what others still have in hand: firmware's
			 * pages, maybe, taken by a vCPU that was halted and waits for a CPU.
			 */
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
		if (!self->started || atomic_load(&work) || atomic_load(&at_work))
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
		      batch_running())) {
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		for (size_t i = 0; i < vcpu_count; i++) {
			uint64_t since = atomic_load(&vcpus[i].busy_since);

			if (since && now > since + STUCK)
				interrupt(vcpus[i].tid);
		}
		batch_watch();
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
