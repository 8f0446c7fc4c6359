// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * QEMU's memory and files that may belong to the guest. The hooks ignore all other memory and
 * files.
 *
 * Allocators call madvise(), fallocate() and mmap() while they hold their own locks, so the
 * functions that look up a range take no lock. Entries are added and extended, but never removed,
 * because a stale entry only makes a hook slower.
 */
#ifndef QEMU_PREFAULT_PLUGIN_GUEST_RANGES_H
#define QEMU_PREFAULT_PLUGIN_GUEST_RANGES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Add [start, end). inode is 0 for anonymous memory. */
void pf_guest_ranges_add(uint64_t start, uint64_t end, dev_t device, ino_t inode);

/* Return whether [start, start + size) overlaps an entry. */
bool pf_guest_ranges_touch(uint64_t start, uint64_t size);
/* Return whether an entry is a mapping of this file. */
bool pf_guest_ranges_have_file(int fd);
/* Return whether at least one entry exists. */
bool pf_guest_ranges_exist(void);

#endif
