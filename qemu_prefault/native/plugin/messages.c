// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "messages.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "state.h"

enum {
	LINES = 256,
	LINE_LENGTH = 1024, /* less than PIPE_BUF, so that a pipe takes each line whole */
	RETRY_SECONDS = 1,
	EXIT_MS = 300, /* how long the exit of QEMU may wait for the reader of stderr */
};

static pthread_cond_t queued = PTHREAD_COND_INITIALIZER;
static char lines[LINES][LINE_LENGTH];
static size_t first, count; /* the first line is being written while `writing` is set */
static bool writing;
static uint64_t lost, reported_lost;
static pid_t owner;	/* the process that has queued the lines, not its forks */
static pid_t writer;	/* the process whose thread writes; 0: none */
static time_t retry_at; /* CLOCK_MONOTONIC: when to try again to start the thread */

static time_t now_seconds(void)
{
	return pf_deadline_in(0).tv_sec;
}

static char *next_line(void)
{
	return lines[(first + count++) % LINES];
}

void pf_print_error(const char *format, ...)
{
	va_list arguments;

	owner = getpid();
	/* A line that reports lost lines needs a place of its own. */
	if (count + (lost != reported_lost) >= LINES) {
		lost++;
		return;
	}
	if (lost != reported_lost) {
		snprintf(next_line(), LINE_LENGTH,
			 "qemu-prefault: %llu messages were lost, because the reader of stderr did "
			 "not read them\n",
			 (unsigned long long)(lost - reported_lost));
		reported_lost = lost;
	}
	char *line = next_line();

	va_start(arguments, format);
	if (vsnprintf(line, LINE_LENGTH, format, arguments) >= LINE_LENGTH)
		line[LINE_LENGTH - 2] = '\n';
	va_end(arguments);
	pthread_cond_broadcast(&queued);
	pthread_cond_broadcast(&pf_changed); /* the watchdog starts the writer */
}

/* Write a line, and wait if stderr is full. Called without a lock. */
static void write_line(const char *line)
{
	size_t left = strlen(line);
	struct pollfd poll_fd = { .fd = STDERR_FILENO, .events = POLLOUT };

	while (left) {
		ssize_t written = write(STDERR_FILENO, line, left);

		if (written < 0 && errno == EAGAIN)
			poll(&poll_fd, 1, -1); /* another process has set O_NONBLOCK */
		else if (written < 0 && errno != EINTR)
			return; /* stderr is closed, or the disk is full */
		if (written > 0) {
			line += written;
			left -= (size_t)written;
		}
	}
}

static void *write_lines(void *unused)
{
	char line[LINE_LENGTH];

	(void)unused;
	pthread_mutex_lock(&pf_lock);
	for (;;) {
		while (!count)
			pthread_cond_wait(&queued, &pf_lock);
		memcpy(line, lines[first], sizeof(line));
		writing = true;
		pthread_mutex_unlock(&pf_lock);
		write_line(line);
		pthread_mutex_lock(&pf_lock);
		writing = false;
		first = (first + 1) % LINES;
		count--;
	}
	return NULL;
}

bool pf_messages_need_writer(void)
{
	return count && writer != getpid() && now_seconds() >= retry_at;
}

void pf_messages_start_writer(void)
{
	pthread_t thread;

	pthread_mutex_lock(&pf_lock);
	bool needed = pf_messages_need_writer();
	pid_t before = writer;

	if (needed)
		writer = getpid();
	pthread_mutex_unlock(&pf_lock);
	if (!needed || pf_start_thread(&thread, "prefault-stderr", write_lines))
		return;
	pthread_mutex_lock(&pf_lock);
	writer = before;
	retry_at = now_seconds() + RETRY_SECONDS;
	pthread_mutex_unlock(&pf_lock);
}

uint64_t pf_messages_lost(void)
{
	return lost;
}

void pf_messages_finish(void)
{
	if (owner != getpid())
		return; /* the parent of this fork writes the lines, and pf_lock may be held */
	for (int i = 0; i < EXIT_MS; i++) {
		/* A thread that no longer runs may hold pf_lock. */
		if (!pthread_mutex_trylock(&pf_lock)) {
			size_t left = count;
			bool start = pf_messages_need_writer();

			pthread_mutex_unlock(&pf_lock);
			if (!left)
				return;
			if (start)
				pf_messages_start_writer();
		}
		poll(NULL, 0, 1);
	}
}
