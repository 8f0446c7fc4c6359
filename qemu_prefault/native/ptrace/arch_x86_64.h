// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The x86-64 part of inject.c: the registers of a stopped thread, their setup for a system call,
 * and the signal frame from which rt_sigreturn loads them.
 */
#ifndef QEMU_PREFAULT_ARCH_X86_64_H
#define QEMU_PREFAULT_ARCH_X86_64_H

#include <cpuid.h>
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
#define XSAVE_HEADER 512
#define XSAVE_HEADER_END 576
#define XSAVE_FEATURES 63
#define XSAVE_EXTENDED 2 /* the first feature after the header */
#define CPUID_XSTATE 0xd

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

/* A feature of the XSAVE area. The offset and the size are in bytes. */
struct xsave_feature {
	uint32_t offset, size;
	int dynamic; /* a thread must ask for permission, see arch_prctl(ARCH_REQ_XCOMP_PERM) */
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
 * If the kernel would continue the interrupted system call with restart_syscall(2), let it repeat
 * the system call from its start. A relative timeout then starts again. Returns whether *regs has
 * changed.
 */
static inline int arch_avoid_restart_syscall(struct user_regs_struct *regs)
{
	if ((long)regs->orig_rax < 0 || -(long)regs->rax != ERESTART_RESTARTBLOCK)
		return 0;
	regs->rax = (unsigned long)-ERESTARTNOINTR;
	return 1;
}

/* Read the places of all features in the standard format of the XSAVE area. */
static inline void arch_read_features(struct xsave_feature features[XSAVE_FEATURES])
{
	memset(features, 0, XSAVE_FEATURES * sizeof(*features));
	for (uint32_t i = XSAVE_EXTENDED; i < XSAVE_FEATURES; i++) {
		uint32_t flags, edx;

		__cpuid_count(CPUID_XSTATE, i, features[i].size, features[i].offset, flags, edx);
		features[i].dynamic = flags >> 2 & 1; /* IA32_XFD can disable the feature */
	}
}

static inline void arch_write_magic2(unsigned char *xstate, size_t size)
{
	uint32_t magic2 = FP_XSTATE_MAGIC2;

	memcpy(xstate + size, &magic2, sizeof(magic2));
}

/*
 * Convert the FPU state from ptrace's format to the format that rt_sigreturn reads
 * (arch/x86/kernel/fpu/signal.c, fpu__restore_sig()). The buffer must have ARCH_XSTATE_TAIL more
 * bytes than size. Returns the new size.
 *
 * rt_sigreturn needs the size of the thread's own state. If the size is wrong, it restores only the
 * x87 and SSE registers (check_xstate_in_sigframe()). ptrace's format has space for all features.
 * However, a thread's own state has space for dynamic features, such as AMX's tiles, only after
 * the thread has used them. Depending on its version, Linux finds FP_XSTATE_MAGIC2 with the size in
 * the frame or with the size of the thread's own state. If no dynamic feature is in use, this
 * function therefore writes the smaller size, and FP_XSTATE_MAGIC2 for both sizes.
 */
static inline size_t arch_seal_xstate(unsigned char *xstate, size_t size,
				      const struct xsave_feature features[XSAVE_FEATURES])
{
	struct fx_sw_bytes sw = { .magic1 = FP_XSTATE_MAGIC1 };
	uint32_t small = XSAVE_HEADER_END;
	uint64_t in_use, dynamic = 0;

	memcpy(&in_use, xstate + XSAVE_HEADER, sizeof(in_use)); /* XSTATE_BV */
	/* copy_xstate_to_uabi_buf() (arch/x86/kernel/fpu/xstate.c) has stored the features here. */
	memcpy(&sw.xfeatures, xstate + FXSAVE_SW_RESERVED, sizeof(sw.xfeatures));
	for (uint32_t i = XSAVE_EXTENDED; i < XSAVE_FEATURES; i++) {
		uint32_t end = features[i].offset + features[i].size;

		if (!(sw.xfeatures >> i & 1))
			continue;
		if (features[i].dynamic)
			dynamic |= 1ull << i;
		else if (end > small)
			small = end;
	}
	sw.xstate_size = dynamic && !(dynamic & in_use) && small < size ? small : (uint32_t)size;
	sw.extended_size = sw.xstate_size + ARCH_XSTATE_TAIL;
	memcpy(xstate + FXSAVE_SW_RESERVED, &sw, sizeof(sw));
	arch_write_magic2(xstate, sw.xstate_size);
	arch_write_magic2(xstate, size);
	return size + ARCH_XSTATE_TAIL;
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
