// SPDX-License-Identifier: GPL-2.0-or-later
/* Process one chunk on a vCPU that is not in the guest. */
#ifndef QEMU_PREFAULT_PLUGIN_CHUNK_H
#define QEMU_PREFAULT_PLUGIN_CHUNK_H

#include <stdbool.h>
#include <stdint.h>

#include "state.h"

/* The work of a vCPU thread before one KVM_RUN, or of the thread that uses the prefault vCPUs. */
struct run_ctx {
	struct vcpu *vcpu;
	uint64_t deadline;    /* CLOCK_MONOTONIC, in ns; 0: no deadline */
	uint64_t chunk_bytes; /* maximum size of a system call */
	uint64_t steps;	      /* system calls that populate or prefault */
	bool in_ioctl;
};

/*
 * Populate and prefault an item. Returns the bytes that are completed. Call with pf_lock held. The
 * function releases pf_lock during system calls.
 */
uint64_t pf_chunk_run(struct work_item item, struct run_ctx *ctx);

/*
 * Report all chunks since the last call in one event. `started` is set if the guest has run.
 * Call with pf_lock held.
 */
void pf_chunk_report(bool started);

#endif
