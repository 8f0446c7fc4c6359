// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The x86-64 part of inject.c: the registers of a stopped thread, their setup for a system call,
 * and the signal frame from which rt_sigreturn loads them.
 */
#ifndef QEMU_PREFAULT_ARCH_X86_64_H
#define QEMU_PREFAULT_ARCH_X86_64_H

#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/user.h>

#include "common/syscall_x86_64.h"

#define ARCH_RED_ZONE 128	    /* bytes below the stack pointer that may be in use */
#define ARCH_STACK_ALIGN 64	    /* alignment that XRSTOR requires */
#define ARCH_XSTATE_MAX (16u << 10) /* maximum size of the FPU state in bytes */
#define ARCH_XSTATE_NOTE NT_X86_XSTATE
#define ARCH_XSTATE_TAIL sizeof(uint32_t) /* FP_XSTATE_MAGIC2 after the state in a signal frame */

/* __USER_CS in arch/x86/include/asm/segment.h. A thread in 32-bit code has another selector. */
#define USER_CS_64 0x33

/* include/linux/errno.h. The kernel shows these values to ptrace, but not to the thread. */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

/* arch/x86/include/uapi/asm/{ucontext,sigcontext}.h. glibc's headers lack some of them. */
#define UC_FP_XSTATE 0x1
#define UC_SIGCONTEXT_SS 0x2
#define UC_STRICT_RESTORE_SS 0x4
#define FP_XSTATE_MAGIC1 0x46505853U
#define FP_XSTATE_MAGIC2 0x46505845U
#define FXSAVE_SW_RESERVED 464
#define XSAVE_HEADER_END 576

/* With this invalid ss_flags mode, do_sigaltstack() (kernel/signal.c) changes nothing. */
#define ALTSTACK_LEFT_ALONE 0x7f

struct sigcontext_64 {
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

struct signal_frame {
	uint64_t restorer;
	uint64_t flags, link;
	struct {
		uint64_t sp;
		uint32_t flags, padding;
		uint64_t size;
	} altstack;
	struct sigcontext_64 context;
	uint64_t mask;
};

struct fx_sw_bytes {
	uint32_t magic1, extended_size;
	uint64_t xfeatures;
	uint32_t xstate_size, padding[7];
};

/*
 * Return whether the thread runs 64-bit code and has XSAVE state. This file supports only such
 * threads.
 */
static inline int arch_usable(const struct user_regs_struct *regs, size_t xstate_size)
{
	return regs->cs == USER_CS_64 && xstate_size >= XSAVE_HEADER_END;
}

static inline uint64_t arch_stack_pointer(const struct user_regs_struct *regs)
{
	return regs->rsp;
}

/* Return the address below which the thread's stack is unused. */
static inline uint64_t arch_free_stack(const struct user_regs_struct *regs)
{
	return regs->rsp - ARCH_RED_ZONE;
}

/* Return whether the thread is in ioctl(fd, request), or stopped at its entry. */
static inline int arch_is_ioctl(const struct user_regs_struct *regs, uint32_t request)
{
	return (long)regs->orig_rax == SYS_ioctl && (uint32_t)regs->rsi == request;
}

static inline long arch_result(const struct user_regs_struct *regs)
{
	return (long)regs->rax;
}

/* Set up a system call restart as arch_do_signal_or_restart() (arch/x86/kernel/signal.c) does. */
static inline void arch_fix_up_restart(struct user_regs_struct *regs)
{
	long number = (long)regs->orig_rax;

	if (number >= 0) {
		switch (-(long)regs->rax) {
		case ERESTARTSYS:
		case ERESTARTNOINTR:
		case ERESTARTNOHAND:
			regs->rax = (unsigned long)number;
			regs->rip -= SYSCALL_BYTES;
			break;
		case ERESTART_RESTARTBLOCK:
			regs->rax = SYS_restart_syscall;
			regs->rip -= SYSCALL_BYTES;
			break;
		}
	}
	regs->orig_rax = (unsigned long)-1;
}

/*
 * Convert the FPU state from ptrace's format to the format that rt_sigreturn reads
 * (arch/x86/kernel/fpu/signal.c, fpu__restore_sig()). Returns the new size, which is
 * ARCH_XSTATE_TAIL bytes larger.
 */
static inline size_t arch_seal_xstate(unsigned char *xstate, size_t size)
{
	struct fx_sw_bytes sw = { .magic1 = FP_XSTATE_MAGIC1,
				  .extended_size = (uint32_t)size + ARCH_XSTATE_TAIL,
				  .xstate_size = (uint32_t)size };
	uint32_t magic2 = FP_XSTATE_MAGIC2;

	/* copy_xstate_to_uabi_buf() (arch/x86/kernel/fpu/xstate.c) has stored the features here. */
	memcpy(&sw.xfeatures, xstate + FXSAVE_SW_RESERVED, sizeof(sw.xfeatures));
	memcpy(xstate + FXSAVE_SW_RESERVED, &sw, sizeof(sw));
	memcpy(xstate + size, &magic2, sizeof(magic2));
	return size + sizeof(magic2);
}

/*
 * Set the registers for a system call with the "syscall; ret" at ip. The ret then jumps to the
 * address that is stored at sp. The child of clone() gets the address of its control page in rbx.
 */
static inline void arch_set_call(struct user_regs_struct *regs, long number, const uint64_t args[6],
				 uint64_t rbx, uint64_t ip, uint64_t sp)
{
	regs->rax = (unsigned long)number;
	regs->rdi = args[0];
	regs->rsi = args[1];
	regs->rdx = args[2];
	regs->r10 = args[3];
	regs->r8 = args[4];
	regs->r9 = args[5];
	regs->rbx = rbx;
	regs->rip = ip;
	regs->rsp = sp;
}

/* Make a thread that has finished a system call continue with the signal frame at sp. */
static inline void arch_skip_to(struct user_regs_struct *regs, uint64_t sp)
{
	regs->rsp = sp;
	regs->orig_rax = (unsigned long)-1;
}

/*
 * Make the thread call munmap(), with the "syscall; ret" at ip, before it continues with the signal
 * frame. Call this after arch_skip_to().
 */
static inline void arch_insert_munmap(struct user_regs_struct *regs, uint64_t start, uint64_t size,
				      uint64_t ip)
{
	regs->rax = SYS_munmap;
	regs->rdi = start;
	regs->rsi = size;
	regs->rip = ip;
}

static inline void arch_fill_frame(struct signal_frame *frame, const struct user_regs_struct *regs,
				   uint64_t mask, uint64_t restorer, uint64_t xstate_at)
{
	*frame = (struct signal_frame){
		.restorer = restorer,
		.flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		.altstack.flags = ALTSTACK_LEFT_ALONE,
		.context = {
			.r8 = regs->r8, .r9 = regs->r9, .r10 = regs->r10, .r11 = regs->r11,
			.r12 = regs->r12, .r13 = regs->r13, .r14 = regs->r14, .r15 = regs->r15,
			.di = regs->rdi, .si = regs->rsi, .bp = regs->rbp, .bx = regs->rbx,
			.dx = regs->rdx, .ax = regs->rax, .cx = regs->rcx, .sp = regs->rsp,
			.ip = regs->rip, .flags = regs->eflags,
			.cs = (uint16_t)regs->cs, .ss = (uint16_t)regs->ss,
			.fpstate = xstate_at,
		},
		.mask = mask,
	};
}

#endif
