// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_FILTERS_H
#define QEMU_PREFAULT_FILTERS_H

#include <stdint.h>

#include "inject_result.h"
#include "target.h"

/* The maximum size of a thread's filters: MAX_INSNS_PER_PATH (kernel/seccomp.c) times 8 bytes. */
#define FILTERS_BYTES_MAX 524288

/*
 * Copy a thread's seccomp filters to buffer: for each filter, the number of instructions
 * (uint32_t), and then the instructions (struct sock_filter). Returns the number of bytes, or -1.
 * The error is EACCES if this process does not have CAP_SYS_ADMIN in the initial user namespace, or
 * if this process has a seccomp filter (seccomp_get_filter(), kernel/seccomp.c).
 */
int64_t pf_read_filters(const struct pf_target *target, int32_t tid, void *buffer, uint64_t size,
			struct inject_result *result);

#endif
