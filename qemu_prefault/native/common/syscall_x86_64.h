// SPDX-License-Identifier: GPL-2.0-or-later
/* System calls without libc. They return the result or a negative errno, and do not set errno. */
#ifndef QEMU_PREFAULT_SYSCALL_X86_64_H
#define QEMU_PREFAULT_SYSCALL_X86_64_H

#include <asm/unistd.h>

#define SYSCALL_BYTES 2 /* length of the syscall instruction */

static inline long prefault_syscall3(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

static inline long prefault_syscall4(long number, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}

#endif
