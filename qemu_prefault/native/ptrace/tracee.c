// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "tracee.h"

#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>

#define STOP_LIMIT_NS 2000000000ull

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
	uint64_t deadline = pf_now_ns() + STOP_LIMIT_NS;
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

int pf_seize(int32_t tid, struct inject_result *result)
{
	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)PTRACE_O_TRACESYSGOOD))
		return pf_fail(result, INJECT_SEIZE, errno);
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return pf_fail(result, INJECT_SEIZE, errno);
	for (;;) {
		int status = pf_wait_stop(tid);

		if (status < 0)
			return pf_fail(result, INJECT_STOP, errno);
		if (status >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8))
			return 0;
		if (status >> 16 ==
		    PTRACE_EVENT_STOP) { /* group stop: another process sent SIGSTOP */
			ptrace(PTRACE_DETACH, tid, NULL, NULL);
			return pf_fail(result, INJECT_STOP, EBUSY);
		}
		/* The thread stopped for a signal. The PTRACE_INTERRUPT stop is still pending. */
		if (ptrace(PTRACE_CONT, tid, NULL, (void *)(long)WSTOPSIG(status)))
			return pf_fail(result, INJECT_STOP, errno);
	}
}
