// SPDX-License-Identifier: GPL-2.0-or-later
/* The helper thread's entry into its own mapping, and its exit. */
#ifndef QEMU_PREFAULT_HELPER_X86_64_H
#define QEMU_PREFAULT_HELPER_X86_64_H

#include "common/syscall_x86_64.h"
#include "control_page.h"

_Static_assert(__builtin_offsetof(struct prefault_control, stack_top) == 8,
	       "the assembly reads stack_top at this offset");

/* The child of clone() returns to this address, with the address of its control page in rbx. */
__asm__(".section .text.entry,\"ax\",@progbits\n"
	".globl pf_helper_entry\n"
	"pf_helper_entry:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rbx, %rdi\n"
	"	mov 8(%rbx), %rsp\n"
	"	call pf_helper_main\n"
	".text\n");

/*
 * Unmap all of the helper's memory with the "syscall; ret" in QEMU's text. The ret then jumps to
 * the exit system call.
 */
__attribute__((noreturn)) static inline void helper_unmap(const struct prefault_control *control)
{
	__asm__ volatile("mov %[slot], %%rsp\n\t"
			 "jmp *%[gadget]"
			 :
			 : [slot] "r"(control->exit_slot), [gadget] "r"(control->syscall_ret),
			   "a"(__NR_munmap), "D"(control->area_start), "S"(control->area_size)
			 : "memory");
	__builtin_unreachable();
}

#endif
