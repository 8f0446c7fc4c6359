// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Batches of ranges that clients send to the control socket. The plugin's own threads process the
 * ranges on stopped vCPUs.
 */
#ifndef QEMU_PREFAULT_PLUGIN_BATCH_H
#define QEMU_PREFAULT_PLUGIN_BATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/prefault_range.h"
#include "errors.h"
#include "limits.h"

/* The ranges of one vCPU's worker. */
struct worker_ranges {
	struct prefault_range *ranges;
	size_t count;
};

/* Let batches use each vCPU that is not in the guest, until this vCPU runs again. */
void pf_batch_lend_vcpus(void);

/* Return the number of workers, one per vCPU. */
size_t pf_batch_worker_count(void);
/*
 * Start a batch, with one thread per worker, or with fewer if QEMU's limits require this. After a
 * successful start, wait until pf_batch_done() returns true and call pf_batch_end(). If no thread can
 * be started, the function stores a clause with the reason.
 */
enum request_error pf_batch_start(struct worker_ranges *assigned, size_t count,
				  uint64_t chunk_bytes, char clause[PF_CLAUSE]);
/*
 * Return whether the batch is done. Sets *bytes to the completed bytes, and *seconds to the
 * duration.
 */
bool pf_batch_done(uint64_t *bytes, double *seconds);
void pf_batch_abort(void);
void pf_batch_end(void);

/* The watchdog calls these functions to interrupt stuck workers. */
bool pf_batch_running(void);
void pf_batch_kick(void);

#endif
