// SPDX-License-Identifier: GPL-2.0-or-later
/* The queue of memory to populate and prefault. Call all functions with pf_lock held. */
#ifndef QEMU_PREFAULT_PLUGIN_QUEUE_H
#define QEMU_PREFAULT_PLUGIN_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "state.h"

/* Queue the whole slot. */
void pf_queue_memslot(struct memslot *slot);
void pf_queue_add(struct work_item item);
void pf_queue_drop_memslot(uint32_t slot);
/* Prefault only resident pages of the slot from now on. */
void pf_queue_make_resident_only(struct memslot *slot);
/* Make all deferred items ready. */
void pf_queue_undefer(const char *why);
/* Set pf_work_available to whether an item can be taken now. */
void pf_queue_update(void);

/* Return whether an item is deferred. */
bool pf_queue_has_deferred(void);
/* Return whether pf_queue_take() can take an item now. */
bool pf_queue_is_ready(void);
/*
 * Take up to one chunk of the first item that is ready. Returns false if none is ready, or if the
 * item must be populated and MOST_POPULATING threads are populating. Set `smm` if the caller can
 * process items of SMM's address space.
 */
bool pf_queue_take(struct work_item *taken, bool smm);
/* Put the rest of a chunk at the front of the queue. `done` is in bytes. */
void pf_queue_put_back(struct work_item item, uint64_t done);

uint64_t pf_queue_pending_bytes(void);
/* Return why the queue is held, or NULL if it is not. */
const char *pf_queue_held_reason(void);

#endif
