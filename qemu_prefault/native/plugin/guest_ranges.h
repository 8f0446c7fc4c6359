// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Which of QEMU's memory and files may be the guest's; all else is of no concern.
 *
 * Allocators call madvise(), fallocate() and mmap() with locks of their own held. So those who ask
 * take no lock here. Entries are added and widened, never removed: a stale one costs only time.
 */
#ifndef QEMU_PREFAULT_PLUGIN_GUEST_RANGES_H
#define QEMU_PREFAULT_PLUGIN_GUEST_RANGES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* inode 0: anonymous memory. */
void pf_guest_ranges_add(uint64_t start, uint64_t end, dev_t device, ino_t inode);

bool pf_guest_ranges_touch(uint64_t start, uint64_t size);
bool pf_guest_ranges_have_file(int fd);
/* There are any. */
bool pf_guest_ranges_exist(void);

#endif
