// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Preloaded in QEMU, makes the plugin fail to start its thread number FAIL_THREAD with EAGAIN, as if
 * QEMU reached a limit after the plugin has checked it. Only the plugin's stacks have 512 KiB.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#define PLUGIN_STACK (512ul << 10)

typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *),
		   void *argument)
{
	static int number;
	create *real = (create *)dlsym(RTLD_NEXT, "pthread_create");
	const char *failing = getenv("FAIL_THREAD");
	size_t stack = 0;

	if (attributes)
		pthread_attr_getstacksize(attributes, &stack);
	if (stack == PLUGIN_STACK && failing && ++number == atoi(failing))
		return EAGAIN;
	return real(thread, attributes, function, argument);
}
