// SPDX-License-Identifier: GPL-2.0-or-later
/* The process that the tool has identified as QEMU, and in which it may change a thread. */
#ifndef QEMU_PREFAULT_TARGET_H
#define QEMU_PREFAULT_TARGET_H

#include <stdint.h>

/*
 * A thread id is only a number, which the kernel reuses after the thread has exited. Therefore
 * pf_seize() compares each thread that it has stopped with these fields. proc_dir is a descriptor of
 * the process's directory in /proc. mem_fd is a descriptor of its memory (/proc/PID/mem), open for
 * reading and writing, or -1 if the caller does not access the memory. uids and gids are the real,
 * effective, saved and file system ids of the process.
 */
struct pf_target {
	int32_t proc_dir, mem_fd;
	uint32_t uids[4], gids[4];
};

#endif
