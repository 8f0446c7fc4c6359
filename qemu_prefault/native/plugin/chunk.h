// SPDX-License-Identifier: GPL-2.0-or-later
/* One chunk of work, done by a vCPU thread that is about to enter the guest. */
#ifndef QEMU_PREFAULT_PLUGIN_CHUNK_H
#define QEMU_PREFAULT_PLUGIN_CHUNK_H

#include <stdbool.h>
#include <stdint.h>

#include "state.h"

/* A vCPU thread at work, from coming until it enters the guest. */
struct run_ctx {
	struct vcpu *vcpu;
	uint64_t deadline;		/* 0: none */
	uint64_t populated, prefaulted; /* bytes */
	bool in_ioctl, again;
};

/* Populate, then prefault. The lock is held, but not while it works. */
void pf_chunk_run(struct work_item item, struct run_ctx *ctx);

#endif
