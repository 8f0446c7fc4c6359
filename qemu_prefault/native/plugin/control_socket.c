// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "control_socket.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "keeper.h"

enum { MAX_CLIENTS = 16, MAX_RANGES = 1 << 20 };

static int listener = -1;
static pid_t owner;
static uid_t our_user;
static atomic_int clients;
static struct sockaddr_un address = { .sun_family = AF_UNIX };

// -- one client ----------------------------------------------------------------------------

static bool gone(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLRDHUP };

	return poll(&poll_fd, 1, 0) > 0;
}

static void answer_error(FILE *out, const char *text)
{
	fprintf(out, "{\"error\":\"%s\"}\n", text);
	fflush(out);
}

static void follow(FILE *out)
{
	uint64_t sequence = keeper_last_event();
	char line[512];

	fprintf(out, "{\"ok\":true}\n");
	while (!fflush(out) && !gone(fileno(out)))
		if (keeper_next_event(&sequence, line, sizeof(line), 500))
			fprintf(out, "%s\n", line);
}

/* COUNT lines "WORKER KIND START SIZE"; order[] and where[] keep the order they came in. */
static const char *read_ranges(FILE *in, size_t count, struct share *shares, size_t vcpus,
			       struct prefault_range *ranges, size_t *where)
{
	char line[128];
	size_t *worker_of = calloc(count + 1, sizeof(*worker_of));
	struct prefault_range *read = calloc(count + 1, sizeof(*read));
	const char *problem = worker_of && read ? NULL : "out of memory";
	size_t next = 0;

	for (size_t i = 0; i < count; i++) {
		unsigned int kind;
		char end;

		if (!fgets(line, sizeof(line), in)) {
			problem = "the list of ranges ended early";
			break;
		}
		if (problem)
			continue; /* read on, so that the next request starts where it should */
		if (sscanf(line, "%zu %u %" SCNu64 " %" SCNu64 " %c", &worker_of[i], &kind,
			   &read[i].start, &read[i].size, &end) != 4 ||
		    worker_of[i] >= vcpus || kind > PREFAULT_STAGE2 || read[i].start % 4096 ||
		    read[i].size % 4096)
			problem = "a range is: WORKER KIND START SIZE, aligned to pages";
		read[i].kind = kind;
	}
	for (size_t vcpu = 0; !problem && vcpu < vcpus; vcpu++) {
		shares[vcpu].ranges = &ranges[next];
		for (size_t i = 0; i < count; i++)
			if (worker_of[i] == vcpu) {
				where[i] = next;
				ranges[next++] = read[i];
				shares[vcpu].count++;
			}
	}
	free(worker_of);
	free(read);
	return problem;
}

/* Progress until it is done; the client's abort, or its end, ends it. */
static double attend_batch(int fd, FILE *in, FILE *out)
{
	uint64_t bytes;
	double seconds;
	char line[64];

	while (!keeper_batch_done(&bytes, &seconds)) {
		struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLRDHUP };

		fprintf(out, "{\"progress\":%" PRIu64 "}\n", bytes);
		if (fflush(out))
			keeper_abort_batch();
		if (poll(&poll_fd, 1, seconds < 0.1 ? 5 : 100) <= 0)
			continue;
		if ((poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) ||
		    !fgets(line, sizeof(line), in) || !strncmp(line, "abort", 5)) {
			keeper_abort_batch();
			poll(NULL, 0, 5);
		}
	}
	return seconds;
}

static void work(int fd, FILE *in, FILE *out, size_t count, uint64_t chunk_bytes)
{
	size_t vcpus = keeper_vcpu_count();
	struct prefault_range *ranges = calloc(count + 1, sizeof(*ranges));
	struct share *shares = calloc(vcpus + 1, sizeof(*shares));
	size_t *where = calloc(count + 1, sizeof(*where));
	const char *problem = ranges && shares && where ?
				      read_ranges(in, count, shares, vcpus, ranges, where) :
				      "out of memory";

	if (!problem && (chunk_bytes < 4096 || chunk_bytes % 4096))
		problem = "a chunk is a multiple of 4096 bytes";
	if (!problem)
		problem = keeper_start_batch(shares, vcpus, chunk_bytes);
	if (problem) {
		answer_error(out, problem);
	} else {
		fprintf(out, "{\"ok\":true}\n");
		double seconds = attend_batch(fd, in, out);

		keeper_end_batch();
		fprintf(out, "{\"done\":[");
		for (size_t i = 0; i < count; i++)
			fprintf(out, "%s[%" PRIu64 ",%d]", i ? "," : "", ranges[where[i]].done,
				ranges[where[i]].error);
		fprintf(out, "],\"seconds\":%.6f}\n", seconds);
		fflush(out);
	}
	free(ranges);
	free(shares);
	free(where);
}

static bool answer(int fd, FILE *in, FILE *out, char *line)
{
	size_t count;
	uint64_t chunk_bytes;
	char end;

	line[strcspn(line, "\r\n")] = '\0';
	if (!strcmp(line, "status")) {
		keeper_status(out);
		fprintf(out, "\n");
	} else if (!strcmp(line, "pause") || !strcmp(line, "resume")) {
		keeper_pause(line[0] == 'p');
		fprintf(out, "{\"ok\":true}\n");
	} else if (!strcmp(line, "prefault")) {
		fprintf(out, "{\"ok\":true,\"pending\":%" PRIu64 "}\n", keeper_prefault_all());
	} else if (!strcmp(line, "follow")) {
		follow(out);
		return false;
	} else if (sscanf(line, "work %zu %" SCNu64 " %c", &count, &chunk_bytes, &end) == 2 &&
		   count <= MAX_RANGES) {
		work(fd, in, out, count, chunk_bytes);
	} else {
		for (int i = 0; i < 3; i++)
			if (!strncmp(line, "populate ", 9) && !strcmp(line + 9, populate_names[i])) {
				keeper_set_populate((enum populate)i);
				fprintf(out, "{\"ok\":true}\n");
				return !fflush(out);
			}
		answer_error(out, "the requests are: status, pause, resume, prefault, follow, "
				  "populate auto|all|resident, work COUNT CHUNK_BYTES");
	}
	return !fflush(out);
}

static void *serve(void *argument)
{
	int fd = (int)(intptr_t)argument;
	int duplicate = dup(fd);
	FILE *in = fdopen(fd, "r"), *out = duplicate < 0 ? NULL : fdopen(duplicate, "w");
	char line[256];

	while (in && out && fgets(line, sizeof(line), in) && answer(fd, in, out, line))
		;
	if (in)
		fclose(in);
	else
		close(fd);
	if (out)
		fclose(out);
	else if (duplicate >= 0)
		close(duplicate);
	atomic_fetch_sub(&clients, 1);
	return NULL;
}

// -- the listener --------------------------------------------------------------------------

/* Root, or who QEMU is or was started as. */
static bool welcome(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) &&
	       (peer.uid == 0 || peer.uid == our_user || peer.uid == geteuid());
}

static void *listen_on(void *unused)
{
	(void)unused;
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		pthread_attr_t detached;
		pthread_t thread;

		if (fd < 0) {
			if (errno != EINTR && errno != ECONNABORTED)
				poll(NULL, 0, 100); /* out of descriptors */
			continue;
		}
		if (!welcome(fd) || atomic_fetch_add(&clients, 1) >= MAX_CLIENTS) {
			if (welcome(fd))
				atomic_fetch_sub(&clients, 1);
			close(fd);
			continue;
		}
		pthread_attr_init(&detached);
		pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
		if (pthread_create(&thread, &detached, serve, (void *)(intptr_t)fd)) {
			atomic_fetch_sub(&clients, 1);
			close(fd);
		}
		pthread_attr_destroy(&detached);
	}
	return NULL;
}

static void remove_socket(void)
{
	if (getpid() == owner)
		unlink(address.sun_path);
}

/* A socket that nobody listens on is what a killed QEMU left. */
static bool bind_here(const char *path)
{
	mode_t before;
	bool bound;
	int probe;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return false;
	}
	strcpy(address.sun_path, path);
	probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (probe < 0)
		return false;
	if (connect(probe, (struct sockaddr *)&address, sizeof(address)) && errno == ECONNREFUSED)
		unlink(path);
	close(probe);
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0)
		return false;
	before = umask(0177);
	bound = !bind(listener, (struct sockaddr *)&address, sizeof(address));
	umask(before);
	if (bound && !listen(listener, MAX_CLIENTS))
		return true;
	int error = errno;

	close(listener);
	errno = error;
	return false;
}

static bool bind_default(void)
{
	const char *const directories[] = { getenv("XDG_RUNTIME_DIR"), "/run", getenv("TMPDIR"),
					    "/tmp" };
	char path[sizeof(address.sun_path)];

	for (size_t i = 0; i < sizeof(directories) / sizeof(*directories); i++) {
		if (!directories[i] || !*directories[i])
			continue;
		snprintf(path, sizeof(path), "%s/qemu-prefault-%d.sock", directories[i], getpid());
		if (bind_here(path))
			return true;
	}
	return false;
}

void control_start(void)
{
	pthread_t thread;
	char name[16];

	if (!(options.socket[0] ? bind_here(options.socket) : bind_default())) {
		fprintf(stderr, "qemu-prefault: no control socket %s: %s\n", address.sun_path,
			strerror(errno));
		return;
	}
	owner = getpid();
	our_user = geteuid();
	atexit(remove_socket);
	/* How qemu-prefault finds it, wherever it is: the thread tells the descriptor. */
	snprintf(name, sizeof(name), "prefault/%d", listener);
	start_thread(&thread, name, listen_on);
}
