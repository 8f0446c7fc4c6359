// SPDX-License-Identifier: GPL-2.0-or-later
/* Work that comes from outside, done by threads of our own on vCPUs that are stopped. */
#ifndef QEMU_PREFAULT_PLUGIN_BATCH_H
#define QEMU_PREFAULT_PLUGIN_BATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/prefault_range.h"
#include "errors.h"

/* What one vCPU's worker is to do. */
struct worker_ranges {
	struct prefault_range *ranges;
	size_t count;
};

/* One per vCPU. */
size_t pf_batch_worker_count(void);
/* One thread per worker; every start has its end, after it is done. */
enum request_error pf_batch_start(struct worker_ranges *assigned, size_t count,
				  uint64_t chunk_bytes);
bool pf_batch_done(uint64_t *bytes, double *seconds);
void pf_batch_abort(void);
void pf_batch_end(void);

/* For the watchdog: kick whoever hinders a batch out of the ioctl, or out of its way. */
bool pf_batch_running(void);
void pf_batch_kick(void);

#endif
