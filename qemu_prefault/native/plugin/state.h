// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * All that the plugin's files share. Each variable is changed by the files that are named
 * above it; the others read it. It is guarded by pf_lock, but for what is atomic.
 *
 * The files, lowest first; each includes and calls only those above it in this list
 * (tests/unit/test_native_structure.py holds them to it):
 *
 *   os              system calls, threads, time
 *   options         what the user asked for
 *   errors          why a request is not done
 *   state           this
 *   event_log       what happened, for the control socket and the log
 *   guest_ranges    which memory may be the guest's
 *   host_ranges     what is known of QEMU's own memory
 *   headroom        what the host can still give
 *   quirk           KVM_X86_QUIRK_SLOT_ZAP_ALL
 *   firmware        how far the guest's firmware is with low RAM
 *   queue           what is still to be populated and prefaulted
 *   memslots        QEMU's changes of memslots
 *   qemu_memory     QEMU's changes of its own memory
 *   chunk           one chunk of work, done by a vCPU thread
 *   guest_start     what is due before the guest's first instruction
 *   vcpu            the hook around KVM_RUN
 *   batch           work that comes from outside
 *   watchdog        the plugin's own thread
 *   status          what the control socket shows
 *   commands        what the control socket is asked for
 *   control_socket  the socket itself
 *   vm              QEMU's VM: where everything starts
 *   got             redirects QEMU's global offset table
 *   interpose       the functions of libc that QEMU calls here
 *   main            being loaded
 */
#ifndef QEMU_PREFAULT_PLUGIN_STATE_H
#define QEMU_PREFAULT_PLUGIN_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "os.h"

#define QUIET_NS MS(1000)   /* no slot of RAM changed for so long: firmware is not at it */
#define STUCK_NS MS(500)    /* in the ioctl without mapping a page */
#define CHUNK MIB(8)	    /* between two looks at whether somebody wants the vCPU */
#define RESERVE (4 * CHUNK) /* left to others, where what they were promised cannot be seen */
#define MAX_VCPUS 4096

enum memslot_state { SLOT_SKIPPED, SLOT_HELD, SLOT_KEPT };

struct memslot {
	uint32_t id; /* the address space in the upper half */
	uint32_t flags;
	uint64_t gpa, size, hva;
	enum memslot_state state;
	bool resident_only;
	const char *why;
	uint64_t prefaulted; /* bytes, since it was created */
};

/* A part of a slot that is yet to be done. */
struct work_item {
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
	bool no_root_yet;		  /* nothing that could be stale */
	bool started;			  /* was let into the guest */
	uint64_t seen_generation;	  /* when it last came back from the guest */
	atomic_uint_least64_t busy_since; /* its thread is in a system call for us; 0: not */
	bool stuck; /* until it has been in the guest, and some time has passed: */
	uint64_t retry_at;
	struct work_item in_progress; /* taken from the queue, and not done; its size is 0: nothing */
	uint64_t slice_ended;
};

extern pthread_mutex_t pf_lock;
extern pthread_cond_t pf_changed; /* anything below; waits by CLOCK_MONOTONIC */

/* Changed by: vm.c */
extern int pf_vm_fd;	 /* -1: none yet */
extern bool pf_capable;	 /* the kernel has the ioctl, and nested paging */
extern bool pf_incoming; /* the guest comes from elsewhere */

/* Changed by: quirk.c */
enum quirk_state { QUIRK_UNDECIDED, QUIRK_ABSENT, QUIRK_KEPT, QUIRK_VFIO, QUIRK_DISABLED };
extern enum quirk_state pf_quirk;
extern const char *const pf_quirk_names[];

/* Changed by: commands.c */
extern bool pf_paused;

/* Changed by: qemu_memory.c */
extern int pf_userfaults;

/* Changed by: memslots.c. In a slot, queue.c and chunk.c note what they did to it. */
extern struct memslot *pf_memslots;
extern size_t pf_memslot_count;
extern atomic_int pf_slot_changes; /* a slot is being changed: stay out of the ioctl */
extern atomic_uint_least64_t pf_root_generation; /* incremented when KVM drops all tables */

/* Changed by: memslots.c, guest_start.c, vcpu.c */
extern uint64_t pf_slot_changed_at; /* or the guest was started, as if one had just been */

/* Changed by: queue.c */
extern struct work_item *pf_queue;
extern size_t pf_queue_length;
extern atomic_bool pf_work_available; /* some item is ready to be taken: see before_run() */

/* Changed by: vcpu.c. With new work, queue.c and qemu_memory.c void it. */
extern uint64_t pf_stall_start; /* when the guest began to wait for us; 0: it has not */

/* Changed by: vcpu.c. In a vCPU, chunk.c and batch.c note what they do on it. */
extern struct vcpu pf_vcpus[MAX_VCPUS];
extern atomic_size_t pf_vcpu_count;
extern bool pf_guest_entered; /* some vCPU was let into the guest */

/* Changed by: guest_start.c */
extern bool pf_guest_started; /* it was let run; some vCPU may still be on its way: */

/* Changed by: chunk.c */
extern atomic_int pf_vcpus_working; /* vCPUs with an item in progress */

/* Changed by: chunk.c, batch.c, and state.c in pf_leave_ioctl() */
extern int pf_in_flight; /* vCPUs in a system call for us */

/* Each by the file that does what it counts. */
extern struct counters {
	uint64_t created, deleted, stuck, errors;
	uint64_t populated, prefaulted, again;
	uint64_t populate_ns, prefault_ns, again_ns;
} pf_counters;

struct memslot *pf_find_memslot(uint32_t id);
struct memslot *pf_memslot_at_gpa(uint64_t gpa);
struct memslot *pf_memslot_at_hva(uint64_t hva);

/* Whoever changes a slot waits for this. The lock is held. */
void pf_leave_ioctl(void);

#endif
