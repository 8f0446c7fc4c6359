// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "os.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

long pf_raw_ioctl(int fd, unsigned long request, void *argument)
{
	return syscall(SYS_ioctl, fd, request, argument);
}

void *pf_raw_mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	return (void *)syscall(SYS_mmap, start, size, protection, flags, fd, offset);
}

/* SIGUSR1 is QEMU's SIG_IPI. Without a handler it would kill the process, so check first. */
void pf_kick_thread(pid_t tid)
{
	struct sigaction action;

	if (tid && !sigaction(SIGUSR1, NULL, &action) && action.sa_handler != SIG_DFL &&
	    action.sa_handler != SIG_IGN)
		syscall(SYS_tgkill, getpid(), tid, SIGUSR1);
}

bool pf_start_thread(pthread_t *thread, const char *name, void *(*function)(void *))
{
	sigset_t all, before;
	bool started;

	sigfillset(&all); /* QEMU's threads must handle its signals */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	started = !pthread_create(thread, NULL, function, NULL);
	if (started)
		pthread_setname_np(*thread, name);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return started;
}

struct timespec pf_deadline_in(uint64_t ns)
{
	struct timespec when;

	clock_gettime(CLOCK_MONOTONIC, &when);
	ns += (uint64_t)when.tv_nsec;
	when.tv_sec += (time_t)(ns / 1000000000);
	when.tv_nsec = (long)(ns % 1000000000);
	return when;
}

bool pf_has_argument(const char *wanted)
{
	char *line = NULL;
	size_t capacity = 0;
	bool found = false;
	FILE *file = fopen("/proc/self/cmdline", "re");

	while (file && !found && getdelim(&line, &capacity, '\0', file) > 0)
		found = !strcmp(line[0] == '-' && line[1] == '-' ? line + 1 : line, wanted);
	free(line);
	if (file)
		fclose(file);
	return found;
}

bool pf_grow(void **array, size_t *capacity, size_t count, size_t item)
{
	if (count < *capacity)
		return true;
	size_t wanted = *capacity ? 2 * *capacity : 64;
	void *more = realloc(*array, wanted * item);

	if (!more)
		return false;
	*array = more;
	*capacity = wanted;
	return true;
}
