// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
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

bool pf_create_thread(pthread_t *thread, void *(*function)(void *), void *argument)
{
	pthread_attr_t small;
	int error;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, PF_STACK);
	error = pthread_create(thread, &small, function, argument);
	pthread_attr_destroy(&small);
	/* The stack also holds the thread-local variables of all libraries, which may be large. */
	if (error == EINVAL)
		error = pthread_create(thread, NULL, function, argument);
	errno = error;
	return !error;
}

bool pf_start_thread(pthread_t *thread, const char *name, void *(*function)(void *))
{
	sigset_t all, before;
	bool started;

	sigfillset(&all); /* QEMU's threads must receive QEMU's signals */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	started = pf_create_thread(thread, function, NULL);
	int error = errno;

	if (started)
		pthread_setname_np(*thread, name);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	errno = error;
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

static bool is_option(const char *argument, const char *wanted)
{
	return !strcmp(argument[0] == '-' && argument[1] == '-' ? argument + 1 : argument, wanted);
}

static bool contains(const char *argument, const char *text)
{
	return strstr(argument, text);
}

/* Find an argument of QEMU. If value is not NULL, also store the next argument. */
static bool find_argument(bool (*matches)(const char *, const char *), const char *wanted,
			  char *value, size_t size)
{
	char *line = NULL;
	size_t capacity = 0;
	bool found = false;
	FILE *file = fopen("/proc/self/cmdline", "re");

	while (file && !found && getdelim(&line, &capacity, '\0', file) > 0)
		found = matches(line, wanted);
	if (found && value)
		found = getdelim(&line, &capacity, '\0', file) > 0 &&
			(size_t)snprintf(value, size, "%s", line) < size;
	free(line);
	if (file)
		fclose(file);
	return found;
}

bool pf_has_argument(const char *wanted)
{
	return find_argument(is_option, wanted, NULL, 0);
}

bool pf_argument_contains(const char *text)
{
	return find_argument(contains, text, NULL, 0);
}

bool pf_option_value(const char *option, char *value, size_t size)
{
	return find_argument(is_option, option, value, size);
}

/* The plugin's threads call this, so it does not use stdio: malloc() maps an arena per thread. */
bool pf_has_seccomp_filter(void)
{
	static const char key[] = "\nSeccomp:\t";
	size_t matched = 0;
	char text[512], mode = '2'; /* a filter, unless the kernel says otherwise */
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	ssize_t length;
	bool done = false;

	while (fd >= 0 && !done && (length = read(fd, text, sizeof(text))) > 0)
		for (ssize_t i = 0; i < length && !done; i++) {
			done = matched == sizeof(key) - 1;
			if (done)
				mode = text[i];
			else
				matched = text[i] == key[matched] ? matched + 1 : text[i] == key[0];
		}
	if (fd >= 0)
		close(fd);
	return mode != '0';
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

void pf_json_escape(char *out, size_t size, const char *text)
{
	size_t at = 0;

	for (; *text && at + 2 < size; text++) {
		if (*text == '"' || *text == '\\')
			out[at++] = '\\';
		out[at++] = *text >= ' ' && *text <= '~' ? *text : '?';
	}
	out[at] = '\0';
}
