// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "control_socket.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "commands.h"
#include "options.h"
#include "os.h"

enum { MAX_CLIENTS = 16 };

static int listener = -1;
static pid_t owner;
static uid_t our_user;
static atomic_int clients;
static struct sockaddr_un address = { .sun_family = AF_UNIX };

static void *serve(void *argument)
{
	int fd = (int)(intptr_t)argument;
	int duplicate = dup(fd);
	FILE *in = fdopen(fd, "r"), *out = duplicate < 0 ? NULL : fdopen(duplicate, "w");
	char line[256];

	while (in && out && fgets(line, sizeof(line), in) && pf_command_answer(fd, in, out, line))
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

/* Accept root, QEMU's current user, and the user who started QEMU. */
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
				poll(NULL, 0, 100); /* too many open files: wait */
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

/* Bind the socket to a path. Replaces a socket that a killed QEMU has left at this path. */
static bool bind_here(const char *path)
{
	mode_t before;
	bool bound;
	int probe;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return false;
	}
	memcpy(address.sun_path, path, strlen(path) + 1);
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

void pf_control_socket_start(void)
{
	pthread_t thread;
	char name[16];

	if (!(pf_options.socket[0] ? bind_here(pf_options.socket) : bind_default())) {
		fprintf(stderr,
			"qemu-prefault: cannot create the control socket %s: %s. Use the "
			"socket=/PATH or socket=off option\n",
			address.sun_path, strerror(errno));
		return;
	}
	owner = getpid();
	our_user = geteuid();
	atexit(remove_socket);
	/* qemu-prefault finds the socket by the descriptor number in the thread's name. */
	snprintf(name, sizeof(name), "prefault/%d", listener);
	pf_start_thread(&thread, name, listen_on);
}
