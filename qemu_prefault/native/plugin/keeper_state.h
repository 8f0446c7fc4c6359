/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the keeper's files share, and nobody else sees.
 *
 *   events.c   what happened, for the control socket and the log
 *   slots.c    the memslots, and the queue of pieces that are yet to be done
 *   keeper.c   the vCPU threads that do them, and what QEMU tells
 *   orders.c   what the control socket asks for
 *   batch.c    work that comes from outside, piece by piece
 *
 * All of it is guarded by the lock, but for what is atomic.
 */
#ifndef QEMU_PREFAULT_KEEPER_STATE_H
#define QEMU_PREFAULT_KEEPER_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "keeper.h"

#define MIB(n) ((uint64_t)(n) << 20)
#define GIB(n) ((uint64_t)(n) << 30)
#define MS(n) ((uint64_t)(n) * 1000000)
#define QUIET MS(1000) /* no slot of RAM changed for so long: firmware is not at it */
#define STUCK MS(500) /* in the ioctl without mapping a page */
#define MAX_VCPUS 4096

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

extern pthread_mutex_t lock;
extern pthread_cond_t changed; /* anything below; waits by CLOCK_MONOTONIC */

extern int vm_fd; /* -1: none yet */
extern bool capable; /* the kernel has the ioctl, and nested paging */
enum quirk { QUIRK_UNDECIDED, QUIRK_ABSENT, QUIRK_KEPT, QUIRK_VFIO, QUIRK_DISABLED };
extern enum quirk quirk;
extern const char *const quirk_names[];
extern bool paused, incoming;
extern int userfaults;

extern struct vcpu vcpus[MAX_VCPUS];
extern atomic_size_t vcpu_count;

extern struct slot *slots;
extern size_t slot_count;
extern struct piece *pieces;
extern size_t piece_count;

extern atomic_bool work;	/* some piece is ready to be taken: see before_run() */
extern atomic_int changing;	/* a slot is being changed: stay out of the ioctl */
extern int in_flight;		/* vCPUs in a system call for us */
extern bool guest_started; /* it was let run; some vCPU may still be on its way: */
extern bool guest_entered;
extern atomic_uint_least64_t zaps; /* of everything, by KVM */
extern uint64_t held_since;	/* when the guest began to wait for us; 0: it has not */
extern uint64_t slot_changed_at;

extern struct counters {
	uint64_t created, deleted, stuck, errors;
	uint64_t populated, prefaulted, again;
	uint64_t populate_ns, prefault_ns, again_ns;
} counters;

/* events.c. The format is of further fields, each with a comma before it. */
void event(const char *name, const char *why, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
struct timespec in_future(uint64_t ns);

/* slots.c */
struct slot *find_slot(uint32_t id);
struct slot *slot_at_hva(uint64_t hva);
void queue_slot(struct slot *slot);
void add_piece(struct piece piece);
void put_first(struct piece piece);
void drop_pieces(uint32_t slot);
/* Forget a piece, by its place in the queue. */
void remove_piece(size_t at);
void make_resident_only(struct slot *slot);
void undefer(const char *why);
void update_work(void);
uint64_t pending_bytes(void);
const char *held_reason(void);
bool firmware_at_work(void);
bool firmware_copies_itself(void);

/* keeper.c */
void interrupt(pid_t tid);
void leave_ioctl(void);
void decide_quirk(void);

/* batch.c: get out of the ioctl, or out of its way, who hinders a batch. */
bool batch_running(void);
void batch_watch(void);

#endif
