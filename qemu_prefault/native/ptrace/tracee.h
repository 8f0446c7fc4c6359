// SPDX-License-Identifier: GPL-2.0-or-later
/* Stop a thread of another process with ptrace. */
#ifndef QEMU_PREFAULT_TRACEE_H
#define QEMU_PREFAULT_TRACEE_H

#include <stdint.h>

#include "inject_result.h"

uint64_t pf_now_ns(void);

/* Store the stage and the error of a failed injection. Returns -1. */
int pf_fail(struct inject_result *result, int stage, int error);

/* Wait up to 2 s for a ptrace stop. Returns the wait status, or -1 with errno set. */
int pf_wait_stop(int32_t tid);

/*
 * Seize and stop the thread. Signals that arrive meanwhile are delivered to the thread. Returns 0,
 * or -1 with the reason in *result.
 */
int pf_seize(int32_t tid, struct inject_result *result);

#endif
