// SPDX-License-Identifier: GPL-2.0-or-later
#include "event_log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "messages.h"
#include "options.h"
#include "state.h"

enum {
	EVENTS = 256,
	EVENT_LENGTH = 320,
};

static char events[EVENTS][EVENT_LENGTH];
static uint64_t event_count;

void pf_log_event(const char *name, const char *why, const char *format, ...)
{
	char *line = events[event_count % EVENTS];
	struct timespec now;
	va_list arguments;
	int length;

	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(line, EVENT_LENGTH, "{\"event\":\"%s\",\"time\":%lld.%03ld", name,
			  (long long)now.tv_sec, now.tv_nsec / 1000000);
	if (why)
		length += snprintf(line + length, EVENT_LENGTH - (size_t)length, ",\"why\":\"%s\"",
				   why);
	va_start(arguments, format);
	length += vsnprintf(line + length, EVENT_LENGTH - (size_t)length, format, arguments);
	va_end(arguments);
	if (length < EVENT_LENGTH - 1)
		memcpy(line + length, "}", sizeof("}"));
	event_count++;
	pthread_cond_broadcast(&pf_changed);
	if (pf_options.log)
		pf_print_error("qemu-prefault: %s\n", line);
}

uint64_t pf_last_event(void)
{
	pthread_mutex_lock(&pf_lock);
	uint64_t count = event_count;

	pthread_mutex_unlock(&pf_lock);
	return count;
}

bool pf_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms)
{
	struct timespec until = pf_deadline_in(MS(timeout_ms));
	bool found;

	pthread_mutex_lock(&pf_lock);
	while (event_count == *sequence)
		if (pthread_cond_timedwait(&pf_changed, &pf_lock, &until))
			break;
	found = event_count != *sequence;
	if (found) {
		if (event_count - *sequence > EVENTS)
			*sequence = event_count - EVENTS;
		snprintf(line, size, "%s", events[(*sequence)++ % EVENTS]);
	}
	pthread_mutex_unlock(&pf_lock);
	return found;
}
