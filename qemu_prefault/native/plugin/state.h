// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The state that the plugin's files share. A comment above each variable names the files that
 * change it. The other files only read it. pf_lock guards everything that is not atomic.
 *
 * The files in the order of their layers, lowest first. Each file uses only the headers and
 * functions of files above it in this list (checked by tests/unit/test_native_structure.py):
 *
 *   os               system calls, threads, time
 *   pace             the CPU time that the plugin's threads use
 *   options          the user's options
 *   limits           whether QEMU's limits allow more threads and descriptors
 *   errors           errors in replies to control socket requests
 *   state            this file
 *   messages         lines on stderr
 *   event_log        events for the control socket and the log
 *   guest_ranges     memory and files that may belong to the guest
 *   host_ranges      facts about QEMU's memory
 *   headroom         memory that QEMU can still allocate
 *   quirk            KVM_X86_QUIRK_SLOT_ZAP_ALL
 *   prefault_vcpu    vCPUs that never run
 *   firmware         the state of the firmware
 *   queue            memory to populate and prefault
 *   memslots         QEMU's changes to memslots
 *   qemu_memory      QEMU's changes to its memory
 *   claims           whether enough memory is available to populate
 *   chunk            one chunk, processed by a vCPU thread
 *   guest_start      preparation before the guest's first instruction
 *   prefault_thread  the thread that uses the prefault vCPUs
 *   vcpu             the hook around KVM_RUN
 *   batch            batches of ranges from the control socket
 *   watchdog         the thread that interrupts vCPUs and stuck ioctls
 *   status           the control socket's status reply
 *   commands         the control socket's requests
 *   clients          the control socket's clients
 *   control_socket   the socket itself
 *   vm               QEMU's VM, whose creation starts the plugin
 *   got              redirection of QEMU's global offset table
 *   interpose        replacements of libc functions that QEMU calls
 *   main             loading and unloading
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

#define QUIET_NS MS(1000)    /* if no RAM slot changes for this long, the firmware has finished */
#define STUCK_NS MS(500)     /* maximum time in the ioctl without progress */
#define CHUNK MIB(8)	     /* a vCPU thread checks for other requests after each chunk */
#define RUNNING_CHUNK MIB(1) /* as CHUNK, but if the guest runs, because QEMU may wait for it */
#define MOST_POPULATING 4    /* threads that populate at the same time */
/*
 * Left for other users of a source, whose claims are unknown, and for the chunks that other threads
 * populate while a thread checks the source.
 */
#define RESERVE (MOST_POPULATING * CHUNK)
#define MAX_VCPUS 4096
#define PF_SMM_END MIB(1) /* SeaBIOS uses only memory below this address in SMM; see queue.c */

enum memslot_state { SLOT_SKIPPED, SLOT_HELD, SLOT_KEPT };

struct memslot {
	uint32_t id; /* the upper 16 bits are the address space */
	uint32_t flags;
	uint64_t gpa, size, hva;
	enum memslot_state state;
	bool resident_only;
	bool created_logged; /* QEMU always logs video memory */
	const char *why;
	uint64_t prefaulted; /* bytes since the slot was created */
};

/* A part of a slot that must still be populated or prefaulted. */
struct work_item {
	uint64_t gpa, size, hva;
	uint32_t slot;
	bool populate, stage2;
	bool resident; /* only pages that are present */
	bool deferred; /* wait until firmware has finished */
};

struct vcpu {
	int fd;
	unsigned long id;
	pid_t tid;
	struct kvm_run *run;
	atomic_bool in_guest;
	atomic_bool lent;		  /* a batch may use it: it has not run since it was lent */
	bool in_use;			  /* a batch is in the prefault ioctl on it */
	bool no_root_yet;		  /* the vCPU has no root, so none can be stale */
	bool started;			  /* has entered the guest */
	uint64_t seen_generation;	  /* pf_root_generation at its last return from the guest */
	atomic_uint_least64_t busy_since; /* start of its thread's prefault ioctl; 0: no ioctl */
	bool stuck; /* unusable until it has entered the guest and retry_at has passed */
	uint64_t retry_at;
	struct work_item in_progress; /* the item that its thread processes; size 0: none */
	uint64_t slice_ended;
};

extern pthread_mutex_t pf_lock;
extern pthread_cond_t pf_changed; /* signals all changes below; uses CLOCK_MONOTONIC */

/* Changed by: vm.c */
extern int pf_vm_fd;	 /* -1: no VM yet */
extern bool pf_capable;	 /* KVM reports KVM_CAP_PRE_FAULT_MEMORY */
extern bool pf_incoming; /* QEMU was started with -incoming */

/* Changed by: quirk.c */
enum quirk_state { QUIRK_UNDECIDED, QUIRK_ABSENT, QUIRK_KEPT, QUIRK_VFIO, QUIRK_DISABLED };
extern enum quirk_state pf_quirk;
extern const char *const pf_quirk_names[];

/* Changed by: commands.c */
extern bool pf_paused;

/* Changed by: qemu_memory.c */
enum userfault { USERFAULT_NONE, USERFAULT_SNAPSHOT, USERFAULT_POSTCOPY };
extern enum userfault pf_userfault; /* for what QEMU has registered memory with a userfaultfd */

/* Changed by: memslots.c. queue.c and chunk.c record their work in the slots. */
extern struct memslot *pf_memslots;
extern size_t pf_memslot_count;
extern atomic_int pf_slot_changes; /* slot changes in progress; if not 0, no ioctl may start */
extern atomic_uint_least64_t pf_root_generation; /* incremented when KVM drops all tables */

/* Changed by: memslots.c, vcpu.c */
extern bool pf_boot_slot_created;  /* a slot of low RAM, which firmware makes QEMU create */
extern bool pf_flash_slot_created; /* a slot of UEFI's flash memory */

/* Changed by: memslots.c, guest_start.c, vcpu.c */
extern uint64_t pf_slot_changed_at; /* time of the last slot change or guest start */

/* Changed by: queue.c */
extern struct work_item *pf_queue;
extern size_t pf_queue_length;
extern atomic_bool pf_work_available; /* an item is ready: see before_run() in vcpu.c */

/* Changed by: vcpu.c. queue.c and qemu_memory.c reset it when new work arrives. */
extern uint64_t pf_stall_start; /* when the guest began to wait; 0: it does not wait */

/* Changed by: vcpu.c. chunk.c and batch.c record their work in the vCPUs. */
extern struct vcpu pf_vcpus[MAX_VCPUS];
extern atomic_size_t pf_vcpu_count;
extern bool pf_guest_entered; /* a vCPU has entered the guest */

/* Changed by: prefault_thread.c, vcpu.c */
extern bool pf_booting; /* the guest may wait for the prefault thread */

/* Changed by: guest_start.c */
extern bool pf_guest_started; /* pf_guest_start() has run; see also pf_guest_entered */

/* Changed by: vcpu.c */
extern bool pf_dirty_ring; /* dirty pages are logged in a ring for each vCPU */

/* Changed by: chunk.c */
extern atomic_int pf_vcpus_working; /* vCPUs with an item in progress */
extern int pf_populating;	    /* threads that populate a chunk */

/* Changed by: chunk.c, batch.c, and state.c in pf_leave_ioctl() */
extern int pf_in_flight; /* threads in a populate or prefault call */

/* Each counter is changed by the file that performs the counted work. */
extern struct counters {
	uint64_t created, deleted, stuck, errors;
	uint64_t populated, prefaulted, again;
	uint64_t populate_ns, prefault_ns, again_ns;
} pf_counters;

struct memslot *pf_find_memslot(uint32_t id);
struct memslot *pf_memslot_at_gpa(uint64_t gpa);
struct memslot *pf_memslot_at_hva(uint64_t hva);

/*
 * Return whether KVM logs writes to guest RAM in rings. In this case, the ioctl must not run, as it
 * would log each page in the ring of its vCPU (mark_page_dirty_in_slot(), virt/kvm/kvm_main.c). The
 * function ignores slots that have been logged since their creation, such as video memory.
 */
bool pf_logs_to_ring(void);

/* Decrement pf_in_flight and wake waiting slot changes. Call with pf_lock held. */
void pf_leave_ioctl(void);

#endif
