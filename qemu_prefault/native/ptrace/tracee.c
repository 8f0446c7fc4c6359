// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "tracee.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arch_x86_64.h"

#define IDS 4
/*
 * The Uid and Gid lines are among the first lines of /proc/PID/status. The name, which precedes
 * them, is at most 64 bytes long with escapes (proc_task_name(), fs/proc/array.c).
 */
#define STATUS_BYTES 1024

uint64_t pf_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int pf_fail(struct inject_result *result, int stage, int error)
{
	result->stage = stage;
	result->error = error;
	return -1;
}

int pf_wait_stop(int32_t tid)
{
	return pf_wait_stop_until(tid, pf_now_ns() + STOP_LIMIT_NS);
}

int pf_wait_stop_until(int32_t tid, uint64_t deadline)
{
	struct timespec pause = { 0, 20000 };
	int status;

	for (;;) {
		int32_t got = waitpid(tid, &status, __WALL | WNOHANG);

		if (got == tid) {
			if (WIFSTOPPED(status))
				return status;
			errno = ESRCH; /* the thread exited or was killed */
			return -1;
		}
		if (got < 0 && errno != EINTR)
			return -1;
		if (pf_now_ns() > deadline) {
			errno = ETIMEDOUT;
			return -1;
		}
		nanosleep(&pause, NULL);
		if (pause.tv_nsec < 1000000)
			pause.tv_nsec *= 2;
	}
}

/*
 * Read the start of the thread's status through the target's directory in /proc. The kernel finds
 * the thread only if it belongs to this process (proc_task_lookup(), fs/proc/base.c).
 */
static int read_status(const struct pf_target *target, int32_t tid, char status[STATUS_BYTES])
{
	char path[32];
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "task/%d/status", tid);
	fd = openat(target->proc_dir, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	size = read(fd, status, STATUS_BYTES - 1);
	close(fd);
	if (size <= 0)
		return -1;
	status[size] = 0;
	return 0;
}

/* Return whether a line of the status, such as "\nUid:", contains these ids. */
static bool has_ids(const char *status, const char *line, const uint32_t ids[IDS])
{
	const char *at = strstr(status, line);

	if (!at)
		return false;
	at += strlen(line);
	for (int i = 0; i < IDS; i++) {
		char *end;
		unsigned long id = strtoul(at, &end, 10);

		if (end == at || id != ids[i])
			return false;
		at = end;
	}
	return true;
}

/*
 * Return 0 if the stopped thread runs in the memory of target->mem_fd. This function writes a random
 * word below the red zone of the thread's stack with the descriptor, reads the word with ptrace, and
 * then restores the old word. kcmp(2) compares the memory of two threads, but not that of a
 * descriptor, which refers to the old memory after an execve().
 */
static int check_memory(const struct pf_target *target, int32_t tid, struct inject_result *result)
{
	struct user_regs_struct regs;
	uint64_t old, random, at;
	long found;

	if (getrandom(&random, sizeof(random), 0) != sizeof(random) ||
	    ptrace(PTRACE_GETREGS, tid, NULL, &regs))
		return pf_fail(result, INJECT_INSPECT, errno);
	at = (arch_free_stack(&regs) - sizeof(random)) & ~(sizeof(random) - 1);
	errno = 0;
	ptrace(PTRACE_PEEKDATA, tid, (void *)at, NULL);
	if (errno) {
		result->stack_needed = arch_stack_pointer(&regs) - at;
		return pf_fail(result, INJECT_INSPECT, ENOSPC);
	}
	if (pread(target->mem_fd, &old, sizeof(old), (off_t)at) != sizeof(old) ||
	    pwrite(target->mem_fd, &random, sizeof(random), (off_t)at) != sizeof(random))
		return pf_fail(result, INJECT_IDENTITY, ESTALE);
	errno = 0;
	found = ptrace(PTRACE_PEEKDATA, tid, (void *)at, NULL);
	if (errno)
		found = (long)~random;
	(void)!pwrite(target->mem_fd, &old, sizeof(old), (off_t)at);
	return (uint64_t)found == random ? 0 : pf_fail(result, INJECT_IDENTITY, ESTALE);
}

int pf_check_identity(const struct pf_target *target, int32_t tid, struct inject_result *result)
{
	char status[STATUS_BYTES];

	if (read_status(target, tid, status))
		return pf_fail(result, INJECT_IDENTITY, ESRCH);
	if (!has_ids(status, "\nUid:", target->uids) || !has_ids(status, "\nGid:", target->gids))
		return pf_fail(result, INJECT_IDENTITY, ESTALE);
	return target->mem_fd < 0 ? 0 : check_memory(target, tid, result);
}

void pf_release(int32_t tid)
{
	struct user_regs_struct regs;

	if (!ptrace(PTRACE_GETREGS, tid, NULL, &regs) && arch_avoid_restart_syscall(&regs))
		ptrace(PTRACE_SETREGS, tid, NULL, &regs);
	ptrace(PTRACE_DETACH, tid, NULL, NULL);
}

static int stop(int32_t tid, struct inject_result *result)
{
	for (;;) {
		int status = pf_wait_stop(tid);

		if (status < 0)
			return pf_fail(result, INJECT_STOP, errno);
		if (status >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8))
			return 0;
		if (status >> 16 ==
		    PTRACE_EVENT_STOP) { /* group stop: another process sent SIGSTOP */
			pf_release(tid);
			return pf_fail(result, INJECT_STOP, EBUSY);
		}
		/* The thread stopped for a signal. The PTRACE_INTERRUPT stop is still pending. */
		if (ptrace(PTRACE_CONT, tid, NULL, (void *)(long)WSTOPSIG(status)))
			return pf_fail(result, INJECT_STOP, errno);
	}
}

int pf_seize(const struct pf_target *target, int32_t tid, struct inject_result *result)
{
	char status[STATUS_BYTES];

	/* Do not stop a thread of another process, which could then see an EINTR. */
	if (read_status(target, tid, status))
		return pf_fail(result, INJECT_IDENTITY, ESRCH);
	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)PTRACE_O_TRACESYSGOOD))
		return pf_fail(result, INJECT_SEIZE, errno);
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return pf_fail(result, INJECT_SEIZE, errno);
	if (stop(tid, result))
		return -1;
	/* The id may have been reused before PTRACE_SEIZE. It cannot be reused any more. */
	if (pf_check_identity(target, tid, result)) {
		pf_release(tid);
		return -1;
	}
	return 0;
}
