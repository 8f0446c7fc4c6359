// SPDX-License-Identifier: GPL-2.0-or-later
/* Functions that the conformance suite's VMM cannot implement in Python. */
#ifndef QEMU_PREFAULT_VMM_H
#define QEMU_PREFAULT_VMM_H

#include <stdint.h>

/* Install an empty handler for pf_vmm_signal(), which interrupts ioctls. Returns 0 or -errno. */
int pf_vmm_init(void);
/* Return the signal by which pf_vmm_ioctl_limited() interrupts ioctls. Callers may also send it. */
int pf_vmm_signal(void);

/* Call ioctl(). Returns its result or a negative errno. */
long pf_vmm_ioctl(int32_t fd, uint64_t request, uint64_t argument);

/* Call ioctl(). Interrupt it after limit_ns nanoseconds and then every 10 ms. 0 means no limit. */
long pf_vmm_ioctl_limited(int32_t fd, uint64_t request, uint64_t argument, uint64_t limit_ns);

/* Call ioctl() in a child process that shares this process's memory (clone(CLONE_VM)). */
long pf_vmm_ioctl_in_clone(int32_t fd, uint64_t request, uint64_t argument);

/*
 * Make a system call for which libc or Python has no function. Returns its result or a negative
 * errno.
 */
long pf_vmm_syscall(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
		    uint64_t f);

#endif
