// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Functions for qemu_prefault/conformance: ioctls with a time limit, and ioctls in a child process
 * that shares this process's memory.
 *
 * The time limit is needed because kernels that lack commit 20a6cff3b283 (v6.15) or 3ccbf6f47098
 * (v6.18) can retry KVM_PRE_FAULT_MEMORY until the calling thread gets a signal.
 */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STACK_BYTES (64 * 1024)
#define TICK_NS (10 * 1000 * 1000)
#define SECOND_NS 1000000000ull

int pf_vmm_signal(void)
{
	return SIGRTMIN + 3;
}

static void interrupt_only(int number)
{
	(void)number;
}

int pf_vmm_init(void)
{
	/* No SA_RESTART: an interrupted system call must return EINTR. */
	struct sigaction action = { .sa_handler = interrupt_only };

	return sigaction(pf_vmm_signal(), &action, NULL) ? -errno : 0;
}

long pf_vmm_ioctl(int32_t fd, uint64_t request, uint64_t argument)
{
	int answer = ioctl(fd, request, argument);

	return answer < 0 ? -errno : answer;
}

long pf_vmm_ioctl_limited(int32_t fd, uint64_t request, uint64_t argument, uint64_t limit_ns)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = pf_vmm_signal() };
	struct itimerspec when = {
		.it_value = { .tv_sec = (time_t)(limit_ns / SECOND_NS),
			      .tv_nsec = (long)(limit_ns % SECOND_NS) },
		/* Repeat, because the first signal may arrive just before the ioctl starts. */
		.it_interval = { .tv_nsec = TICK_NS },
	};
	timer_t timer;

	if (!limit_ns)
		return pf_vmm_ioctl(fd, request, argument);
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
	event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		return -errno;
	timer_settime(timer, 0, &when, NULL);
	long answer = pf_vmm_ioctl(fd, request, argument);

	timer_delete(timer);
	return answer;
}

struct ioctl_call {
	int32_t fd;
	uint64_t request, argument;
	long answer;
};

static int issue_ioctl(void *context)
{
	struct ioctl_call *call = context;

	call->answer = pf_vmm_ioctl(call->fd, call->request, call->argument);
	return 0;
}

long pf_vmm_ioctl_in_clone(int32_t fd, uint64_t request, uint64_t argument)
{
	struct ioctl_call call = { fd, request, argument, -ECANCELED };
	char *stack = malloc(STACK_BYTES);

	if (!stack)
		return -ENOMEM;
	/* The child uses this thread's errno. CLONE_VFORK suspends this thread meanwhile. */
	int pid = clone(issue_ioctl, stack + STACK_BYTES, CLONE_VM | CLONE_VFORK | SIGCHLD, &call);

	if (pid < 0)
		call.answer = -errno;
	else
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
	free(stack);
	return call.answer;
}

long pf_vmm_syscall(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
		    uint64_t f)
{
	long answer = syscall(number, a, b, c, d, e, f);

	return answer < 0 ? -errno : answer;
}
