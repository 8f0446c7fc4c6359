// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the plugin asks of the kernel and of libc in a way of its own.
 *
 * The plugin stands in for some functions of libc (interpose.c). Called by their names they
 * would be libc's or our own, depending on how the plugin was loaded; so nothing in the
 * plugin calls them by name, and what needs one takes the system call from here.
 */
#ifndef QEMU_PREFAULT_PLUGIN_OS_H
#define QEMU_PREFAULT_PLUGIN_OS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#define MIB(n) ((uint64_t)(n) << 20)
#define GIB(n) ((uint64_t)(n) << 30)
#define MS(n) ((uint64_t)(n) * 1000000)

/* The system calls themselves; as libc's functions: -1 and errno, or MAP_FAILED. */
long pf_raw_ioctl(int fd, unsigned long request, void *argument);
void *pf_raw_mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset);

/* A thread that gets none of QEMU's signals. */
bool pf_start_thread(pthread_t *thread, const char *name, void *(*function)(void *));

/* Get a thread of this process out of a system call; 0: none. */
void pf_kick_thread(pid_t tid);

/* A time for pthread_cond_timedwait() by CLOCK_MONOTONIC. */
struct timespec pf_deadline_in(uint64_t ns);

/* Whether QEMU's command line has that argument. */
bool pf_has_argument(const char *wanted);

/*
 * Make room in an array for one more item; false: no memory. The array is mapped by system call,
 * not allocated: an allocator that waits for pf_lock in one of our hooks holds its own locks.
 */
bool pf_grow(void **array, size_t *room, size_t count, size_t item);

/* Print to stderr without stdio, which allocates and has locks of its own. */
void pf_print_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
