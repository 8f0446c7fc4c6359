// SPDX-License-Identifier: GPL-2.0-or-later
/* What the conformance suite's VMM cannot do from Python; vmm.c tells why. */
#ifndef QEMU_PREFAULT_VMM_H
#define QEMU_PREFAULT_VMM_H

#include <stdint.h>

/* Install the handler of VMM_SIGNAL, which does nothing but interrupt. 0, or a negative errno. */
int pf_vmm_init(void);
/* The signal that ends an ioctl early: the timer's, and anybody's who sends it to a thread. */
int pf_vmm_signal(void);

/* ioctl(): its answer, or a negative errno. */
long pf_vmm_ioctl(int32_t fd, uint64_t request, uint64_t argument);

/* The same, interrupted after limit_ns, and every 10 ms from then on. 0: never. */
long pf_vmm_ioctl_limited(int32_t fd, uint64_t request, uint64_t argument, uint64_t limit_ns);

/* The same, by a child that shares our memory and nothing else (clone(CLONE_VM)). */
long pf_vmm_ioctl_in_clone(int32_t fd, uint64_t request, uint64_t argument);

/* A system call that libc or Python has no function for: its answer, or a negative errno. */
long pf_vmm_syscall(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
		    uint64_t f);

#endif
