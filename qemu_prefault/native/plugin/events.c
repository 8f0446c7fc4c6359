// SPDX-License-Identifier: GPL-2.0-or-later
#include "keeper_state.h"

#include <stdarg.h>
#include <string.h>

enum {
	EVENTS = 256,
	EVENT_LENGTH = 320,
};

static char events[EVENTS][EVENT_LENGTH];
static uint64_t event_count;

void event(const char *name, const char *why, const char *format, ...)
{
	char *line = events[event_count % EVENTS];
	struct timespec now;
	va_list arguments;
	int length;

	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(line, EVENT_LENGTH, "{\"event\":\"%s\",\"time\":%lld.%03ld", name,
			  (long long)now.tv_sec, now.tv_nsec / 1000000);
	if (why)
		length += snprintf(line + length, EVENT_LENGTH - (size_t)length,
				   ",\"why\":\"%s\"", why);
	va_start(arguments, format);
	length += vsnprintf(line + length, EVENT_LENGTH - (size_t)length, format, arguments);
	va_end(arguments);
	if (length < EVENT_LENGTH - 1)
		strcpy(line + length, "}");
	event_count++;
	pthread_cond_broadcast(&changed);
	if (options.log)
		fprintf(stderr, "qemu-prefault: %s\n", line);
}

uint64_t keeper_last_event(void)
{
	pthread_mutex_lock(&lock);
	uint64_t count = event_count;

	pthread_mutex_unlock(&lock);
	return count;
}

struct timespec in_future(uint64_t ns)
{
	struct timespec when;

	clock_gettime(CLOCK_MONOTONIC, &when);
	ns += (uint64_t)when.tv_nsec;
	when.tv_sec += (time_t)(ns / 1000000000);
	when.tv_nsec = (long)(ns % 1000000000);
	return when;
}

bool keeper_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms)
{
	struct timespec until = in_future(MS(timeout_ms));
	bool found;

	pthread_mutex_lock(&lock);
	while (event_count == *sequence)
		if (pthread_cond_timedwait(&changed, &lock, &until))
			break;
	found = event_count != *sequence;
	if (found) {
		if (event_count - *sequence > EVENTS)
			*sequence = event_count - EVENTS;
		snprintf(line, size, "%s", events[(*sequence)++ % EVENTS]);
	}
	pthread_mutex_unlock(&lock);
	return found;
}
