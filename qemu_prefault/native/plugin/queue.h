// SPDX-License-Identifier: GPL-2.0-or-later
/* What is still to be populated and prefaulted, in order. The lock is held around every call. */
#ifndef QEMU_PREFAULT_PLUGIN_QUEUE_H
#define QEMU_PREFAULT_PLUGIN_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "state.h"

/* Queue the whole slot. */
void pf_queue_memslot(struct memslot *slot);
void pf_queue_add(struct work_item item);
void pf_queue_drop_memslot(uint32_t slot);
/* From now on only what is resident, for all of the slot. */
void pf_queue_make_resident_only(struct memslot *slot);
/* What was put off is due. */
void pf_queue_undefer(const char *why);
/* Whether anything can be taken now: sets pf_work_available. */
void pf_queue_update(void);

/* Take up to a chunk of the first item that may be done now. */
bool pf_queue_take(struct work_item *taken);
/* What is left of a chunk goes to the front of the queue. */
void pf_queue_put_back(struct work_item item, uint64_t done);

uint64_t pf_queue_pending_bytes(void);
/* Why nothing is taken; NULL: it is. */
const char *pf_queue_held_reason(void);

#endif
