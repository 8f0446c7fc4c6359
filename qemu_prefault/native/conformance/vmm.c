// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The C under qemu_prefault/conformance: ioctls with a time limit, and from a task that only
 * shares memory.
 *
 * Why a time limit: kernels without commits 20a6cff3b283 (v6.15) and 3ccbf6f47098 (v6.18) can
 * retry KVM_PRE_FAULT_MEMORY for ever, and only a signal to the thread in it gets it out.
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

int vmm_signal(void)
{
	return SIGRTMIN + 3;
}

static void interrupt_only(int number)
{
	(void)number;
}

int vmm_init(void)
{
	/* No SA_RESTART: what is interrupted has to say so. */
	struct sigaction action = { .sa_handler = interrupt_only };

	return sigaction(vmm_signal(), &action, NULL) ? -errno : 0;
}

long vmm_ioctl(int32_t fd, uint64_t request, uint64_t argument)
{
	int answer = ioctl(fd, request, argument);

	return answer < 0 ? -errno : answer;
}

long vmm_ioctl_limited(int32_t fd, uint64_t request, uint64_t argument, uint64_t limit_ns)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = vmm_signal() };
	struct itimerspec when = {
		.it_value = { .tv_sec = (time_t)(limit_ns / SECOND_NS),
			      .tv_nsec = (long)(limit_ns % SECOND_NS) },
		/* Again: the first may come just before the ioctl. */
		.it_interval = { .tv_nsec = TICK_NS },
	};
	timer_t timer;

	if (!limit_ns)
		return vmm_ioctl(fd, request, argument);
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
	event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		return -errno;
	timer_settime(timer, 0, &when, NULL);
	long answer = vmm_ioctl(fd, request, argument);

	timer_delete(timer);
	return answer;
}

struct order {
	int32_t fd;
	uint64_t request, argument;
	long answer;
};

static int carry_out(void *context)
{
	struct order *order = context;

	order->answer = vmm_ioctl(order->fd, order->request, order->argument);
	return 0;
}

long vmm_ioctl_in_clone(int32_t fd, uint64_t request, uint64_t argument)
{
	struct order order = { fd, request, argument, -ECANCELED };
	char *stack = malloc(STACK_BYTES);

	if (!stack)
		return -ENOMEM;
	/* CLONE_VFORK: we wait, because the child uses our thread's errno. */
	int pid = clone(carry_out, stack + STACK_BYTES, CLONE_VM | CLONE_VFORK | SIGCHLD, &order);

	if (pid < 0)
		order.answer = -errno;
	else
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
	free(stack);
	return order.answer;
}

long vmm_syscall(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
		 uint64_t f)
{
	long answer = syscall(number, a, b, c, d, e, f);

	return answer < 0 ? -errno : answer;
}
