// SPDX-License-Identifier: GPL-2.0-or-later
/* Stop a thread of another process with ptrace. */
#ifndef QEMU_PREFAULT_TRACEE_H
#define QEMU_PREFAULT_TRACEE_H

#include <stdint.h>

#include "inject_result.h"
#include "target.h"

uint64_t pf_now_ns(void);

/* Store the stage and the error of a failed injection. Returns -1. */
int pf_fail(struct inject_result *result, int stage, int error);

#define STOP_LIMIT_NS 2000000000ull

/* Wait up to STOP_LIMIT_NS for a ptrace stop. Returns the wait status, or -1 with errno set. */
int pf_wait_stop(int32_t tid);

/* Wait for a ptrace stop like pf_wait_stop(), until pf_now_ns() is greater than `deadline`. */
int pf_wait_stop_until(int32_t tid, uint64_t deadline);

/*
 * Check that a stopped thread is a thread of the target process, that the process has the same user
 * and groups, and that the thread runs in the memory of target->mem_fd. The memory differs if the
 * process has executed another program. The caller traces the thread, so its id cannot be reused.
 *
 * Returns 0, or -1 with the stage INJECT_IDENTITY. The error is ESRCH if the thread belongs to
 * another process, and ESTALE if the process has changed.
 */
int pf_check_identity(const struct pf_target *target, int32_t tid, struct inject_result *result);

/*
 * Detach a stopped thread whose seccomp filters are not known. The thread does not make the system
 * call restart_syscall(2), because a filter may kill the process for it.
 */
void pf_release(int32_t tid);

/*
 * Seize and stop the thread, and check that it belongs to the target process. Signals that arrive
 * meanwhile are delivered to the thread. Returns 0. If the thread belongs to another process, or if
 * the function fails for another reason, it detaches the thread unchanged, and returns -1 with the
 * reason in *result.
 */
int pf_seize(const struct pf_target *target, int32_t tid, struct inject_result *result);

#endif
