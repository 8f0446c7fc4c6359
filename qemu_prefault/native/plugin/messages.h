// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Messages on stderr while QEMU runs.
 *
 * The reader of QEMU's stderr may stop reading. write(2) to a full pipe then blocks for an unlimited
 * time, also if poll(2) has just reported free space, because other processes write to the same
 * pipe. O_NONBLOCK would also apply to these processes. Therefore only a thread that holds no lock
 * writes. If it is blocked and the list of lines is full, new lines are lost.
 */
#ifndef QEMU_PREFAULT_PLUGIN_MESSAGES_H
#define QEMU_PREFAULT_PLUGIN_MESSAGES_H

#include <stdbool.h>
#include <stdint.h>

/* Print a line to stderr later. Never blocks. Call with pf_lock held. */
void pf_print_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Return whether lines wait for a thread that does not exist yet. Call with pf_lock held. */
bool pf_messages_need_writer(void);
/* Start the thread that writes. pthread_create() allocates, so do not hold pf_lock. */
void pf_messages_start_writer(void);

/* Return the number of lines that were lost. Call with pf_lock held. */
uint64_t pf_messages_lost(void);

/* Called when the process exits: wait for a short time until all lines are written. */
void pf_messages_finish(void);

#endif
