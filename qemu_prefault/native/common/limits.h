// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Compute whether a process's limits leave enough for the process itself if the plugin uses a part:
 * tasks, file descriptors, address space and mappings.
 *
 * QEMU aborts if it cannot start a thread (qemu_thread_create(), util/qemu-thread-posix.c), and fails
 * if it cannot open a file or map memory. host/task_limits.py is the implementation for the tool.
 * tests/unit/test_native_limits.py checks that both read the same limits on tasks.
 *
 * No function except pf_limits_find() allocates memory or takes a lock.
 */
#ifndef QEMU_PREFAULT_LIMITS_H
#define QEMU_PREFAULT_LIMITS_H

#include <stdint.h>

#include "common/headroom.h"

/* Tasks that threads must leave for QEMU. This is the maximum size of QEMU's thread pool. */
#define LIMITS_RESERVE 64
/* Tasks that must be left to start a client's thread, and the thread of a client's request. */
#define LIMITS_RESERVE_CLIENT 3
#define LIMITS_RESERVE_REQUEST 2
/* MiB of address space, and mappings, that must be left for each of these tasks. */
#define LIMITS_TASK_MIB 8
#define LIMITS_TASK_MAPPINGS 16

/* The files of the limits. They stay open, because QEMU may change its root directory. */
struct limits_files {
	int32_t proc;		     /* a descriptor for /proc, or -1 */
	int32_t pids;		     /* a descriptor for the directory of `group`, or -1 */
	struct headroom_group group; /* the process's cgroup of the pids controller */
	int32_t locks_memory;	     /* 1: the process locks all its memory */
};

/* What the plugin intends to use. */
struct limits_need {
	uint32_t tasks, descriptors, mappings;
	uint64_t bytes;
	uint32_t reserve; /* tasks, and descriptors, that must be left for QEMU */
};

/* Open the files of this process's limits. The arguments are the paths of the files in /proc. */
void pf_limits_find(const char *proc, const char *cgroup_file, const char *mountinfo_file,
		    struct limits_files *files);
/*
 * Read the start of a file of a cgroup (level 0) or of its ancestor. Returns the number of bytes, or
 * -1. The text ends with a null byte. One descriptor suffices for all levels, because ".." also works
 * after chroot(2).
 */
int32_t pf_limits_read_level(int32_t directory, uint32_t level, const char *name, char *text,
			     uint32_t size);
/* Return the largest number of vCPUs in the value of QEMU's -smp option. */
uint32_t pf_limits_vcpus(const char *smp);
/*
 * Return 1 if each limit still leaves need->reserve after the plugin has used `need`, or if the limit
 * is not readable. Otherwise return 0, and store a clause with the figures of the limit.
 */
int pf_limits_check(const struct limits_files *files, const struct limits_need *need, char *clause,
		    uint32_t size);

#endif
