// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "clients.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "commands.h"
#include "limits.h"
#include "os.h"

enum {
	MAX_CLIENTS = 16,
	CLIENTS_FOR_ROOT = 4, /* if QEMU does not run as root, only root can use these */
	REFUSED_MS = 500,     /* the longest wait for the request of a client that is refused */
	SEND_SECONDS = 10,    /* a client that does not read its replies is disconnected */
};

/* Seconds after which a client that sends no request is disconnected. */
#ifndef PF_IDLE_SECONDS
#define PF_IDLE_SECONDS 300
#endif

static atomic_int clients, other_clients; /* all clients; clients that are not root */

/* A client and its thread. The control thread fills a place that is not in use. */
static struct client {
	atomic_bool in_use;
	int fd;
	bool root;
} places[MAX_CLIENTS];

/* malloc() may map one arena for the client's thread and one for the control thread. */
static const struct limits_need client_need = {
	.tasks = 1,
	.descriptors = 1,
	.mappings = 8,
	.bytes = PF_STACK + MIB(256),
	.reserve = LIMITS_RESERVE_CLIENT,
};

static void count_client(bool root, int change)
{
	atomic_fetch_add(&clients, change);
	if (!root)
		atomic_fetch_add(&other_clients, change);
}

static void *serve(void *argument)
{
	struct client *client = argument;
	bool root = client->root;
	int fd = client->fd;
	int duplicate = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	FILE *in = fdopen(fd, "r"), *out = duplicate < 0 ? NULL : fdopen(duplicate, "w");
	char line[256];

	/* At the time limit, fgets() returns a part of a line. */
	while (in && out && fgets(line, sizeof(line), in) && !ferror(in) &&
	       pf_command_answer(fd, in, out, line))
		;
	if (in)
		fclose(in);
	else
		close(fd);
	if (out)
		fclose(out);
	else if (duplicate >= 0)
		close(duplicate);
	atomic_store(&client->in_use, false);
	count_client(root, -1);
	return NULL;
}

/* The last places are for root, so that no other user can keep root from connecting. */
static bool has_place(bool root)
{
	return atomic_load(&clients) < MAX_CLIENTS &&
	       (root || atomic_load(&other_clients) < MAX_CLIENTS - CLIENTS_FOR_ROOT);
}

/*
 * Reply to a client that gets no thread. If the plugin closed the connection before the client sends
 * its request, the client would get EPIPE instead of the reply.
 */
static void refuse(int fd, const char *clause)
{
	char reply[PF_REPLY], request[256];
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	int length = pf_command_no_thread(reply, clause);

	if (poll(&poll_fd, 1, REFUSED_MS) > 0)
		recv(fd, request, sizeof(request), MSG_DONTWAIT);
	send(fd, reply, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static struct client *free_place(void)
{
	for (size_t i = 0; i < MAX_CLIENTS; i++)
		if (!atomic_load(&places[i].in_use))
			return &places[i];
	return NULL;
}

bool pf_client_serve(int fd, bool root)
{
	const struct timeval idle = { .tv_sec = PF_IDLE_SECONDS },
			     send = { .tv_sec = SEND_SECONDS };
	struct client *client = free_place();
	char clause[PF_CLAUSE];
	pthread_t thread;

	if (!has_place(root) || !client)
		return false;
	if (!pf_limits_allow(&client_need, clause)) {
		refuse(fd, clause);
		return false;
	}
	client->fd = fd;
	client->root = root;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof(idle));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &send, sizeof(send));
	atomic_store(&client->in_use, true);
	count_client(root, 1);
	if (pf_create_thread(&thread, serve, client)) {
		pthread_detach(thread);
		return true;
	}
	snprintf(clause, sizeof(clause),
		 "it cannot start a thread: %s. Raise QEMU's limit on threads", strerror(errno));
	atomic_store(&client->in_use, false);
	count_client(root, -1);
	refuse(fd, clause);
	return false;
}
