// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How much CPU time a thread of the plugin uses beside a running guest.
 *
 * A thread inherits the scheduling policy of QEMU's threads, and shares the CPU quotas of QEMU's
 * cgroups with the guest. With SCHED_FIFO, the guest would wait until the thread has finished. If
 * the thread used up a quota, the kernel would stop all of QEMU's threads until the next period.
 */
#ifndef QEMU_PREFAULT_PLUGIN_PACE_H
#define QEMU_PREFAULT_PLUGIN_PACE_H

#include <stdbool.h>
#include <stdint.h>

/* The state of one thread. Zero-initialized before pf_pace_start(). */
struct pace {
	bool may_set;	     /* no seccomp filter can make sched_setscheduler() fatal */
	uint64_t checked_at; /* when the quotas were read; CLOCK_MONOTONIC, in ns, as all times */
	double quota;	     /* the smallest quota in CPUs, or 0 for none */
	uint64_t quota_ns;   /* the smallest quota in CPU time per period */
	double share;	     /* how much of a CPU the thread may use; 1: all of it */
	uint64_t began, cpu; /* at the start of the piece */
};

/*
 * Open the directory of QEMU's CPU cgroup, because QEMU may change its root directory or user.
 * Allocates, so do not hold pf_lock.
 */
void pf_pace_open(void);
/* Use the CPU cgroup of this directory, which has this number of limited ancestors. For tests. */
void pf_pace_use_group(int directory, int ancestors, bool unified);

/* Called by a thread before its first piece. Allocates, so do not hold pf_lock. */
void pf_pace_start(struct pace *pace);
/*
 * Start a piece of work. Sets the thread's scheduling policy to SCHED_OTHER if it is a real-time
 * policy. Returns the time after which the piece must end, or 0 if the time is not limited. Set
 * `guest_waits` if the guest does not use the CPU meanwhile.
 */
uint64_t pf_pace_begin(struct pace *pace, bool guest_waits);
/* End a piece. Returns the time until which the thread must rest; it may be in the past. */
uint64_t pf_pace_end(const struct pace *pace);

/* Return why a thread has limited its CPU time at its last piece, or NULL if it has not. */
const char *pf_pace_reason(void);

#endif
