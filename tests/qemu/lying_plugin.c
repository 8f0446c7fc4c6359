// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library that poses as the plugin in a QEMU. It serves a control socket at $LYING_SOCKET. It
 * claims that it populates memory, and never ends a batch that prefaults memory. If $LYING_THREAD
 * is set, QEMU also gets a thread with the name of a batch's thread, which never ends.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char status[] = "{\"plugin\":1,\"pre_fault_memory\":true,\"keeping\":true,"
			     "\"quirk\":\"disabled\",\"held\":null,\"vcpus\":[{\"id\":0}],"
			     "\"pending\":0,\"counters\":{\"prefaulted\":0,\"again\":0,"
			     "\"errors\":0}}\n";

static void answer_batch(FILE *in, FILE *out, unsigned int count)
{
	unsigned long long *sizes = calloc(count, sizeof(*sizes));
	unsigned int kind = 0;
	char line[256];

	if (!sizes)
		return;
	for (unsigned int i = 0; i < count && fgets(line, sizeof(line), in); i++)
		sscanf(line, "%*u %u %*u %llu", &kind, &sizes[i]);
	fprintf(out, "{\"ok\":true}\n");
	for (unsigned int i = 0; !kind && i < count; i++)
		fprintf(out, "%s[%llu,0]", i ? "," : "{\"done\":[", sizes[i]);
	if (!kind)
		fprintf(out, "],\"seconds\":0.5}\n");
	free(sizes);
}

static void *serve(void *argument)
{
	int listener = (int)(long)argument;
	char line[256];

	for (;;) {
		int fd = accept(listener, NULL, NULL);
		FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
		unsigned int count;

		while (in && out && fgets(line, sizeof(line), in)) {
			if (!strcmp(line, "status\n"))
				fputs(status, out);
			else if (sscanf(line, "work%*[-lent] %u", &count) == 1 ||
				 sscanf(line, "work %u", &count) == 1)
				answer_batch(in, out, count);
			else
				fputs("{\"ok\":true}\n", out);
			fflush(out);
		}
		if (in)
			fclose(in);
		if (out)
			fclose(out);
	}
	return NULL;
}

static void *wait_forever(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return NULL;
}

__attribute__((constructor)) static void start(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("LYING_SOCKET");
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char name[16];
	pthread_t thread;

	if (!path)
		return;
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 8))
		abort();
	pthread_create(&thread, NULL, serve, (void *)(long)listener);
	snprintf(name, sizeof(name), "prefault/%d", listener);
	pthread_setname_np(thread, name);
	if (getenv("LYING_THREAD") && !pthread_create(&thread, NULL, wait_forever, NULL))
		pthread_setname_np(thread, "prefault-batch");
}
