// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Properties of a file that another process uses. The server of a network or FUSE file system may
 * never respond, and a process that waits for a FUSE server cannot be killed.
 */
#ifndef QEMU_PREFAULT_FILE_INFO_H
#define QEMU_PREFAULT_FILE_INFO_H

#include <stdint.h>

/* The fields of struct stat. device is in the format of dev_t. */
struct file_status {
	uint64_t device;
	uint64_t inode;
	uint64_t size;
	uint64_t allocated; /* bytes */
	uint64_t links;
	uint32_t mode;
};

/* The fields of struct statfs. The sizes are in bytes. */
struct file_system {
	uint64_t type; /* a number of linux/magic.h */
	uint64_t size; /* 0: the file system has no limit, or does not report it */
	uint64_t available;
	uint64_t inodes;
	uint64_t free_inodes;
};

/*
 * Read a file's status without a request to the file system's server, which may have a newer
 * status. Follows a link in /proc/PID. Returns 0 or a negative errno.
 */
int32_t pf_file_status(const char *path, struct file_status *status);

/*
 * Read the figures of a file's file system in a child process, and wait at most `milliseconds` for
 * the child. Returns 0 or a negative errno, which is -ETIMEDOUT after this time.
 */
int32_t pf_file_system(const char *path, int32_t milliseconds, struct file_system *figures);

#endif
