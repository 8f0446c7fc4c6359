// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A process with threads that stop slowly for ptrace. A thread whose child process shares its memory
 * (vfork()) waits, and the kernel stops the thread only after the child has exited. The children
 * exit one after another, and the process exits after all threads have.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define THREADS 6
#define INTERVAL_US 1500000u

static void *wait_for_child(void *argument)
{
	unsigned int us = (unsigned int)(size_t)argument;

	if (vfork() == 0) {
		usleep(us);
		_exit(0);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[THREADS];

	for (size_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, wait_for_child,
				   (void *)((i + 1) * INTERVAL_US)))
			abort();
	usleep(200000); /* let the threads start their children */
	puts("ready");
	fflush(stdout);
	for (size_t i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	return 0;
}
