// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * System calls, threads and time for the plugin.
 *
 * The plugin replaces some libc functions (interpose.c). A call by name would reach libc or the
 * plugin's hook, depending on how the plugin was loaded. Therefore no plugin file calls these
 * functions by name. Use the system calls below instead.
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

/* System calls that bypass the hooks. On error they set errno and return -1 or MAP_FAILED. */
long pf_raw_ioctl(int fd, unsigned long request, void *argument);
void *pf_raw_mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset);

/*
 * The size of the plugin's stacks. The default is RLIMIT_STACK, usually 8 MiB, which would count
 * against RLIMIT_AS, and which mlockall() would allocate.
 */
#define PF_STACK (MIB(1) / 2)

/* Create a thread with a small stack. If this fails, set errno and return false. */
bool pf_create_thread(pthread_t *thread, void *(*function)(void *), void *argument);
/* Start a thread that blocks all signals. If this fails, set errno and return false. */
bool pf_start_thread(pthread_t *thread, const char *name, void *(*function)(void *));

/* Interrupt a system call of one of this process's threads. Does nothing if tid is 0. */
void pf_kick_thread(pid_t tid);

/* Return a CLOCK_MONOTONIC deadline for pthread_cond_timedwait(). */
struct timespec pf_deadline_in(uint64_t ns);

/* Return whether QEMU's command line contains the argument. */
bool pf_has_argument(const char *wanted);
/* Return whether an argument of QEMU contains the text. */
bool pf_argument_contains(const char *text);
/* Store the argument after an option of QEMU. Returns false if the option is absent. */
bool pf_option_value(const char *option, char *value, size_t size);

/*
 * Return whether a seccomp filter may make a system call fatal. QEMU's sandbox, systemd and
 * container runtimes install such filters. The function reads the state of the main thread.
 */
bool pf_has_seccomp_filter(void);

/*
 * Grow an array if needed, so that one more item fits. Returns false if out of memory.
 *
 * The function maps the array with system calls, because malloc() could cause a deadlock. It would
 * wait for an allocator lock, while another thread holds that lock and waits for pf_lock in a hook.
 */
bool pf_grow(void **array, size_t *capacity, size_t count, size_t item);

/* Copy a text, and escape it for a JSON string. Cuts the text if the result would not fit. */
void pf_json_escape(char *out, size_t size, const char *text);

#endif
