// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "file_info.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

int32_t pf_file_status(const char *path, struct file_status *status)
{
	struct statx found;

	if (statx(AT_FDCWD, path, AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &found))
		return -errno;
	*status = (struct file_status){
		.device = makedev(found.stx_dev_major, found.stx_dev_minor),
		.inode = found.stx_ino,
		.size = found.stx_size,
		.allocated = found.stx_blocks * 512,
		.links = found.stx_nlink,
		.mode = found.stx_mode,
	};
	return 0;
}

struct reply {
	int32_t error;
	struct file_system figures;
};

static int32_t ask(int fd, struct file_system *figures)
{
	struct statfs found;
	uint64_t unit;

	if (fstatfs(fd, &found))
		return -errno;
	unit = (uint64_t)(found.f_frsize ? found.f_frsize : found.f_bsize);
	*figures = (struct file_system){ .type = (uint64_t)found.f_type };
	/* Without a size limit, hugetlbfs reports -1 blocks if it has min_size=, and else 0. */
	if ((int64_t)found.f_blocks > 0) {
		figures->size = (uint64_t)found.f_blocks * unit;
		figures->available = (uint64_t)found.f_bavail * unit;
	}
	figures->inodes = found.f_files;
	figures->free_inodes = found.f_ffree;
	return 0;
}

/* Run in the child of a process with threads: call only async-signal-safe functions. */
static void reply_in_grandchild(int fd, int output)
{
	struct reply reply = { 0 };

	/* init reaps the grandchild, which may wait for a server for an unlimited time. */
	if (fork())
		_exit(0);
	/* Keep only these two descriptors, so that no reader of another pipe waits for this process. */
	fd = fcntl(fd, F_DUPFD, 3);
	output = fcntl(output, F_DUPFD, 3);
	dup2(fd, 0);
	dup2(output, 1);
	if (syscall(SYS_close_range, 2u, ~0u, 0u)) /* before Linux 5.9 */
		for (int other = 2; other < 65536; other++)
			close(other);
	reply.error = ask(0, &reply.figures);
	(void)!write(1, &reply, sizeof(reply));
	_exit(0);
}

static int32_t receive(int input, int32_t milliseconds, struct file_system *figures)
{
	struct pollfd waiting = { .fd = input, .events = POLLIN };
	struct reply reply;
	int ready = poll(&waiting, 1, milliseconds);

	if (ready <= 0)
		return ready ? -errno : -ETIMEDOUT;
	if (read(input, &reply, sizeof(reply)) != sizeof(reply))
		return -EIO;
	*figures = reply.figures;
	return reply.error;
}

int32_t pf_file_system(const char *path, int32_t milliseconds, struct file_system *figures)
{
	int fd = open(path, O_PATH | O_CLOEXEC), pipes[2];
	sigset_t all, before;
	int32_t result;
	pid_t child;

	if (fd < 0)
		return -errno;
	if (pipe2(pipes, O_CLOEXEC)) {
		result = -errno;
		close(fd);
		return result;
	}
	/* The child must not run the signal handlers of this process. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	child = fork();
	if (!child)
		reply_in_grandchild(fd, pipes[1]);
	result = child < 0 ? -errno : 0;
	close(fd);
	close(pipes[1]);
	if (!result) {
		while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
			;
		result = receive(pipes[0], milliseconds, figures);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	close(pipes[0]);
	return result;
}
