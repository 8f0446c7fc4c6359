// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_FILTERS_H
#define QEMU_PREFAULT_FILTERS_H

#include <stdint.h>

#include "inject_result.h"

/* All of a thread's filters together: MAX_INSNS_PER_PATH of kernel/seccomp.c, 8 bytes each. */
#define FILTERS_BYTES_MAX 524288

/*
 * Copy a thread's seccomp filters: for each one a uint32_t with the number of its instructions,
 * then those (struct sock_filter). Returns the bytes written, or -1. The error is EACCES without
 * CAP_SYS_ADMIN in the initial user namespace, or under a filter of our own.
 */
int64_t pf_read_filters(int32_t tid, void *buffer, uint64_t size, struct inject_result *result);

#endif
