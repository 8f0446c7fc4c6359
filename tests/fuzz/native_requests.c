// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Feed requests to the code that serves the plugin's control socket. test_native.py links this file
 * with the plugin's files and with the address and undefined behaviour sanitizers.
 *
 * Each input on stdin is a number, which the program ignores, and the data's size, as 32-bit words,
 * followed by the data. The program writes one byte to stdout after each input. SIGPROF kills the
 * program if an input takes more than a second of CPU time.
 *
 * Batches start no threads, because a range can be at any address, and the sanitizer's memory must
 * not be populated.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "plugin/batch.h"
#include "plugin/commands.h"
#include "plugin/state.h"

enum { BUFFER = 8 << 20 };

static struct worker_ranges *batch;
static size_t batch_workers;

enum request_error __wrap_pf_batch_start(struct worker_ranges *assigned, size_t count,
					 uint64_t chunk_bytes);
bool __wrap_pf_batch_done(uint64_t *bytes, double *seconds);
void __wrap_pf_batch_end(void);

enum request_error __wrap_pf_batch_start(struct worker_ranges *assigned, size_t count,
					 uint64_t chunk_bytes)
{
	if (chunk_bytes < 4096 || chunk_bytes % 4096)
		abort();
	batch = assigned;
	batch_workers = count;
	return REQUEST_OK;
}

/* Read each range, so that the sanitizer detects a range outside the array. */
bool __wrap_pf_batch_done(uint64_t *bytes, double *seconds)
{
	*bytes = 0;
	*seconds = 0;
	for (size_t i = 0; i < batch_workers; i++)
		for (size_t j = 0; j < batch[i].count; j++) {
			batch[i].ranges[j].done = batch[i].ranges[j].size;
			*bytes += batch[i].ranges[j].done;
		}
	return true;
}

void __wrap_pf_batch_end(void)
{
	batch_workers = 0;
}

static void serve(const char *text, size_t size)
{
	const struct timeval limit = { .tv_usec = 100000 };
	const int buffer = BUFFER;
	char line[256];
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
		exit(2);
	setsockopt(fds[0], SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer));
	setsockopt(fds[1], SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer));
	setsockopt(fds[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)); /* if root is needed */
	if (send(fds[1], text, size, MSG_DONTWAIT) != (ssize_t)size)
		exit(2);
	shutdown(fds[1], SHUT_WR);

	FILE *in = fdopen(fds[0], "r"), *out = fdopen(dup(fds[0]), "w");

	while (fgets(line, sizeof(line), in) && pf_command_answer(fds[0], in, out, line))
		;
	fclose(in);
	fclose(out);
	close(fds[1]);
}

int main(void)
{
	const struct itimerval second = { .it_value = { .tv_sec = 1 } };
	uint32_t head[2];

	pf_vcpus[0] = (struct vcpu){ .fd = -1 };
	pf_vcpus[1] = (struct vcpu){ .fd = -1, .id = 1 };
	pf_vcpu_count = 2;
	while (fread(head, sizeof(head), 1, stdin) == 1) {
		char *text = malloc(head[1] ? head[1] : 1);

		if (!text || fread(text, 1, head[1], stdin) != head[1])
			return 2;
		setitimer(ITIMER_PROF, &second, NULL);
		serve(text, head[1]);
		free(text);
		putchar('.');
		fflush(stdout);
	}
	return 0;
}
