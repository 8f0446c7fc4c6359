// SPDX-License-Identifier: GPL-2.0-or-later
/* Hold a thread of another process. */
#ifndef QEMU_PREFAULT_TRACEE_H
#define QEMU_PREFAULT_TRACEE_H

#include <stdint.h>

#include "inject_result.h"

uint64_t pf_now_ns(void);

/* Record where an injection ended. Returns -1. */
int pf_fail(struct inject_result *result, int stage, int error);

/* Wait for a ptrace stop; returns its status, or -1 with errno. */
int pf_wait_stop(int32_t tid);

/* Seize the thread and bring it to a stop of our own, signals passed on. */
int pf_seize(int32_t tid, struct inject_result *result);

#endif
