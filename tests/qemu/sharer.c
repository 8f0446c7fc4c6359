// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A program that executes cat when it reads a byte. A second process shares the memory that the
 * program had before, so this memory still exists.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

static char stack[65536] __attribute__((aligned(16)));

static int wait_for_end(void *unused)
{
	(void)unused;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(0);
	close(1);
	for (;;)
		pause();
	return 0;
}

int main(void)
{
	char byte;

	if (clone(wait_for_end, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL) < 0)
		return 1;
	if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
		return 1;
	execlp("cat", "cat", NULL);
	return 1;
}
