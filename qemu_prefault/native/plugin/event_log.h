// SPDX-License-Identifier: GPL-2.0-or-later
/* Events as JSON lines, for the control socket and the log. */
#ifndef QEMU_PREFAULT_PLUGIN_EVENT_LOG_H
#define QEMU_PREFAULT_PLUGIN_EVENT_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Log an event. The format specifies more JSON fields, each preceded by a comma. Call with pf_lock
 * held.
 */
void pf_log_event(const char *name, const char *why, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* Return the sequence number of the latest event. */
uint64_t pf_last_event(void);
/*
 * Get the event after *sequence as a line of JSON, and update *sequence. Returns false if no event
 * arrives within timeout_ms milliseconds.
 */
bool pf_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms);

#endif
