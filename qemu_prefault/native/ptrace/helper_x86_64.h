// SPDX-License-Identifier: GPL-2.0-or-later
/* How the helper thread comes into its own mapping, and how it leaves it. */
#ifndef QEMU_PREFAULT_HELPER_X86_64_H
#define QEMU_PREFAULT_HELPER_X86_64_H

#include "common/syscall_x86_64.h"
#include "control_page.h"

_Static_assert(__builtin_offsetof(struct prefault_control, stack_top) == 8, "used below");

/* clone()'s child returns into this with the control page in rbx. */
__asm__(".section .text.entry,\"ax\",@progbits\n"
	".globl pf_helper_entry\n"
	"pf_helper_entry:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rbx, %rdi\n"
	"	mov 8(%rbx), %rsp\n"
	"	call pf_helper_main\n"
	".text\n");

/* munmap() of all of the helper's memory, made by QEMU's text, which then "returns" to the exit. */
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
