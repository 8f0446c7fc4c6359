// SPDX-License-Identifier: GPL-2.0-or-later
/* React to changes to QEMU's memory: mmap(), madvise(), fallocate(), userfaultfd. */
#ifndef QEMU_PREFAULT_PLUGIN_QEMU_MEMORY_H
#define QEMU_PREFAULT_PLUGIN_QEMU_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

void pf_qemu_memory_learn(void);
void pf_qemu_memory_mapped(uint64_t start, uint64_t size, int fd, int flags);
void pf_qemu_memory_discarded(uint64_t start, uint64_t size);
void pf_qemu_memory_file_discarded(int fd);
void pf_qemu_memory_populated(uint64_t start, uint64_t size);
/* Called after UFFDIO_REGISTER with its modes, and after UFFDIO_UNREGISTER with 0. */
void pf_qemu_memory_userfault(int fd, uint64_t modes);
/*
 * Forget the registrations of userfaultfds that QEMU has closed. No hook reports this: QEMU tests
 * whether it can take background snapshots by registering all memory, and then closes the
 * descriptor (ram_write_tracking_compatible(), migration/ram.c). Call with pf_lock held.
 */
void pf_qemu_memory_check_userfaults(void);

#endif
