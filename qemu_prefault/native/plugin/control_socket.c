// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "control_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
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

#include "clients.h"
#include "options.h"
#include "os.h"

enum { BACKLOG = 128 }; /* connections that the control thread has not accepted yet */

/* The socket's file. A file is ours only if it has the device and the inode of this socket. */
static struct {
	int directory; /* opened with O_PATH */
	const char *name;
	dev_t device;
	ino_t inode;
} bound = { .directory = -1 };

static int listener = -1;
static pid_t owner;
static uid_t our_user;
/* A user id that may belong to several users (see user_is_known()), or (uid_t)-1. */
static uid_t ambiguous_user;
static struct sockaddr_un address = { .sun_family = AF_UNIX };

/* Return the number in a file of one number, or fallback. */
static unsigned long read_number(const char *path, unsigned long fallback)
{
	char text[32];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return fallback;
	text[length] = '\0';
	return strtoul(text, NULL, 10);
}

/*
 * In a user namespace, the kernel reports every user without an id in this namespace as the
 * overflow user, which is usually 65534 (from_kuid_munged(), kernel/user_namespace.c).
 */
static uid_t find_ambiguous_user(void)
{
	char text[256], *end;
	int fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = '\0';
	/* One line "0 0 4294967295": every user has an id. */
	if (!strtoul(text, &end, 10) && !strtoul(end, &end, 10) &&
	    strtoul(end, NULL, 10) == UINT32_MAX)
		return (uid_t)-1;
	return (uid_t)read_number("/proc/sys/kernel/overflowuid", 65534);
}

/*
 * Return whether the peer's user id identifies the user. kill(2) compares the users themselves, and
 * not their ids in this namespace.
 */
static bool user_is_known(const struct ucred *peer)
{
	return peer->uid != ambiguous_user || (peer->pid > 0 && !kill(peer->pid, 0));
}

/* Accept root, QEMU's current user, and the user who started QEMU. */
static bool welcome(int fd, bool *root)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || !user_is_known(&peer))
		return false;
	*root = peer.uid == 0;
	return *root || peer.uid == our_user || peer.uid == geteuid();
}

static void *listen_on(void *unused)
{
	(void)unused;
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		bool root;

		if (fd < 0) {
			if (errno != EINTR && errno != ECONNABORTED)
				poll(NULL, 0, 100); /* too many open files: wait */
			continue;
		}
		if (!welcome(fd, &root) || !pf_client_serve(fd, root))
			close(fd);
	}
	return NULL;
}

/* Read the status of the file at the socket's path. Returns whether it is a socket of our user. */
static bool find_our_socket(struct stat *status)
{
	return !fstatat(bound.directory, bound.name, status, AT_SYMLINK_NOFOLLOW) &&
	       S_ISSOCK(status->st_mode) && status->st_uid == geteuid();
}

/* Remove the socket at exit, unless another process has replaced it. */
static void remove_socket(void)
{
	struct stat status;

	if (getpid() == owner &&
	    !fstatat(bound.directory, bound.name, &status, AT_SYMLINK_NOFOLLOW) &&
	    S_ISSOCK(status.st_mode) && status.st_dev == bound.device &&
	    status.st_ino == bound.inode)
		unlinkat(bound.directory, bound.name, 0);
}

/* Remove a socket of our user on which no process listens. A killed QEMU leaves such a socket. */
static void remove_stale_socket(void)
{
	struct sockaddr_un stale = { .sun_family = AF_UNIX };
	struct stat before, after;
	bool refused;
	int probe;

	/* If the path is too long, the file stays, and bind() fails. */
	if (!find_our_socket(&before) ||
	    snprintf(stale.sun_path, sizeof(stale.sun_path), "/proc/self/fd/%d/%s", bound.directory,
		     bound.name) >= (int)sizeof(stale.sun_path))
		return;
	probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (probe < 0)
		return;
	refused = connect(probe, (struct sockaddr *)&stale, sizeof(stale)) && errno == ECONNREFUSED;
	close(probe);
	if (refused && find_our_socket(&after) && after.st_dev == before.st_dev &&
	    after.st_ino == before.st_ino)
		unlinkat(bound.directory, bound.name, 0);
}

/* Open the directory of address.sun_path. All later steps use this directory. */
static bool open_directory(void)
{
	char parent[sizeof(address.sun_path)];
	char *slash;

	memcpy(parent, address.sun_path, sizeof(parent));
	slash = strrchr(parent, '/');
	if (!slash) {
		errno = EINVAL;
		return false;
	}
	bound.name = address.sun_path + (slash - parent) + 1;
	slash[slash == parent] = '\0'; /* keep the slash of "/NAME" */
	bound.directory = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return bound.directory >= 0;
}

static bool listen_here(void)
{
	struct stat status;
	mode_t before;
	bool done;

	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0)
		return false;
	before = umask(0177);
	done = !bind(listener, (struct sockaddr *)&address, sizeof(address));
	umask(before);
	if (!done || listen(listener, BACKLOG))
		return false;
	if (!find_our_socket(&status)) { /* the directory or the socket was replaced */
		errno = ESTALE;
		return false;
	}
	bound.device = status.st_dev;
	bound.inode = status.st_ino;
	return true;
}

/* Bind the socket to a path. Replaces a socket that a killed QEMU has left at this path. */
static bool bind_here(const char *path)
{
	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return false;
	}
	memcpy(address.sun_path, path, strlen(path) + 1);
	if (open_directory()) {
		remove_stale_socket();
		if (listen_here())
			return true;
	}
	int error = errno;

	if (listener >= 0)
		close(listener);
	if (bound.directory >= 0)
		close(bound.directory);
	listener = bound.directory = -1;
	errno = error;
	return false;
}

/* Return whether only our user and root can rename or remove our files in a directory. */
static bool is_safe(const char *directory, bool *is_shared)
{
	struct stat status;

	if (stat(directory, &status) || !S_ISDIR(status.st_mode) ||
	    (status.st_uid != geteuid() && status.st_uid != 0) ||
	    faccessat(AT_FDCWD, directory, W_OK | X_OK, AT_EACCESS))
		return false;
	*is_shared = status.st_mode & (S_IWGRP | S_IWOTH);
	return !*is_shared || (status.st_mode & S_ISVTX);
}

/* Return whether a path is a directory of our user that no other user can access. */
static bool is_private(const char *directory)
{
	struct stat status;

	return !lstat(directory, &status) && S_ISDIR(status.st_mode) &&
	       status.st_uid == geteuid() && !(status.st_mode & 0077);
}

/*
 * Find a private directory below a directory in which other users can create files, such as /tmp.
 * Another user may have taken the first name. mkdtemp() then creates a directory with a new name.
 */
static bool make_private(const char *parent, char *path, size_t size)
{
	int length = snprintf(path, size, "%s/qemu-prefault-%u", parent, geteuid());

	if (length < 0 || (size_t)length + sizeof("-XXXXXX") > size) {
		errno = ENAMETOOLONG;
		return false;
	}
	int error = mkdir(path, 0700) ? errno : 0;

	if (!error || (error == EEXIST && is_private(path)))
		return true;
	if (error != EEXIST) {
		errno = error;
		return false;
	}
	fprintf(stderr,
		"qemu-prefault: %s is not a directory that only this user can access. The control "
		"socket gets another directory\n",
		path);
	memcpy(path + length, "-XXXXXX", sizeof("-XXXXXX"));
	return mkdtemp(path);
}

static bool bind_default(void)
{
	const char *const directories[] = { getenv("XDG_RUNTIME_DIR"), "/run", getenv("TMPDIR"),
					    "/tmp" };
	char directory[sizeof(address.sun_path)], path[2 * sizeof(address.sun_path)];

	errno = EACCES; /* if no directory is safe */
	for (size_t i = 0; i < sizeof(directories) / sizeof(*directories); i++) {
		const char *parent = directories[i];
		bool is_shared;

		if (!parent || parent[0] != '/' || strlen(parent) >= sizeof(directory) ||
		    !is_safe(parent, &is_shared))
			continue;
		memcpy(directory, parent, strlen(parent) + 1);
		if (is_shared && !make_private(parent, directory, sizeof(directory)))
			continue;
		snprintf(path, sizeof(path), "%s/qemu-prefault-%d.sock", directory, getpid());
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
	ambiguous_user = find_ambiguous_user();
	/* qemu-prefault finds the socket by the descriptor number in the thread's name. */
	snprintf(name, sizeof(name), "prefault/%d", listener);
	if (!pf_start_thread(&thread, name, listen_on)) {
		fprintf(stderr,
			"qemu-prefault: the plugin has no control socket, because it cannot start "
			"a thread: %s. Raise QEMU's limit on threads\n",
			strerror(errno));
		remove_socket();
		close(listener);
		close(bound.directory);
		listener = bound.directory = -1;
		return;
	}
	atexit(remove_socket);
}
