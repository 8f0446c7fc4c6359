// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "os.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ul

long pf_raw_ioctl(int fd, unsigned long request, void *argument)
{
	return syscall(SYS_ioctl, fd, request, argument);
}

void *pf_raw_mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	return (void *)syscall(SYS_mmap, start, size, protection, flags, fd, offset);
}

/*
 * SIGUSR1 is QEMU's SIG_IPI. If no handler is installed, the signal would kill the process, so
 * check first.
 */
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

	sigfillset(&all); /* QEMU's threads must receive QEMU's signals */
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

bool pf_has_seccomp_filter(void)
{
	char *line = NULL;
	size_t capacity = 0;
	int mode = 2; /* a filter, unless the kernel says otherwise */
	FILE *file = fopen("/proc/self/status", "re");

	while (file && getline(&line, &capacity, file) > 0)
		if (sscanf(line, "Seccomp: %d", &mode) == 1)
			break;
	free(line);
	if (file)
		fclose(file);
	return mode != 0;
}

static size_t pages(size_t size)
{
	return (size + PAGE - 1) & ~(PAGE - 1);
}

bool pf_grow(void **array, size_t *capacity, size_t count, size_t item)
{
	if (count < *capacity)
		return true;
	size_t wanted = *capacity ? 2 * *capacity : (PAGE + item - 1) / item;
	void *more;

	if (*capacity)
		more = (void *)syscall(SYS_mremap, *array, pages(*capacity * item),
				       pages(wanted * item), MREMAP_MAYMOVE);
	else
		more = pf_raw_mmap(NULL, pages(wanted * item), PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (more == MAP_FAILED)
		return false;
	*array = more;
	*capacity = wanted;
	return true;
}

void pf_print_error(const char *format, ...)
{
	char text[1024];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(text, sizeof(text), format, arguments);

	va_end(arguments);
	if (length >= (int)sizeof(text))
		length = sizeof(text) - 1;
	if (length > 0 && write(STDERR_FILENO, text, (size_t)length) < 0)
		return; /* stderr is closed */
}
