// SPDX-License-Identifier: GPL-2.0-or-later
/* What happened, as lines of JSON: for the control socket and the log. */
#ifndef QEMU_PREFAULT_PLUGIN_EVENT_LOG_H
#define QEMU_PREFAULT_PLUGIN_EVENT_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The format is of further fields, each with a comma before it. The lock is held. */
void pf_log_event(const char *name, const char *why, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

uint64_t pf_last_event(void);
/* The next event after *sequence, as a line of JSON; false if none came in time. */
bool pf_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms);

#endif
