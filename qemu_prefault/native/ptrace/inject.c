/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Make a thread of another process execute a few system calls, so that nothing
 * needs undoing if we are killed at any instant.
 *
 * Before the thread is touched, everything is written below the red zone of its
 * stack: one signal frame per system call, each holding the registers for the
 * next, and a last one that holds the thread's own. Then a single PTRACE_SETREGS
 * sends it into "syscall; ret": the ret goes to libc's signal restorer, whose
 * rt_sigreturn loads the next frame, and so on until the thread is itself again.
 * We only watch, to stop the chain where a call failed. From the SETREGS on, the
 * kernel and the thread finish the chain without us.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "control_page.h"

#define RED_ZONE 128
#define STACK_ROOM (128u << 10) /* what must be free below the thread's stack pointer */
#define XSTATE_MAX (16u << 10)
#define STOP_LIMIT_NS 2000000000ull
#define CALLS_MAX 4
#define NT_X86_XSTATE_NOTE 0x202

/* arch/x86/include/uapi/asm/{ucontext,sigcontext}.h; glibc's own lack some of it. */
#define UC_FP_XSTATE 0x1
#define UC_SIGCONTEXT_SS 0x2
#define UC_STRICT_RESTORE_SS 0x4
#define FP_XSTATE_MAGIC1 0x46505853U
#define FP_XSTATE_MAGIC2 0x46505845U
#define FXSAVE_SW_RESERVED 464
#define XSAVE_HEADER_END 576

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

struct call {
	long number;
	uint64_t args[6];
	uint64_t rbx; /* clone()'s child finds its control page there */
	int stage;
};

/* Everything that is written to the thread's stack, lowest address first. */
struct chain {
	struct signal_frame frames[CALLS_MAX];
	struct iovec local[1], remote[1];
};

struct victim {
	pid_t pid, tid;
	int mem_fd;
	const struct inject_gadgets *gadgets;
	struct user_regs_struct regs; /* its own, a system call's restart already fixed up */
	uint64_t mask;
	size_t xstate_size;
	unsigned char xstate[XSTATE_MAX + sizeof(uint32_t)] __attribute__((aligned(64)));
	uint64_t chain_at, image_at, xstate_at; /* addresses on its stack */
	uint64_t held_since;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int fail(struct inject_result *result, int stage, int error)
{
	result->stage = stage;
	result->error = error;
	return -1;
}

/* Waits for a ptrace stop; returns its status, or -1 with errno. */
static int wait_stop(pid_t tid)
{
	uint64_t deadline = now_ns() + STOP_LIMIT_NS;
	struct timespec pause = { 0, 20000 };
	int status;

	for (;;) {
		pid_t got = waitpid(tid, &status, __WALL | WNOHANG);

		if (got == tid) {
			if (WIFSTOPPED(status))
				return status;
			errno = ESRCH; /* it exited, or was killed */
			return -1;
		}
		if (got < 0 && errno != EINTR)
			return -1;
		if (now_ns() > deadline) {
			errno = ETIMEDOUT;
			return -1;
		}
		nanosleep(&pause, NULL);
		if (pause.tv_nsec < 1000000)
			pause.tv_nsec *= 2;
	}
}

/* Seize the thread and bring it to a stop of our own, signals passed on. */
static int seize(struct victim *victim, struct inject_result *result)
{
	if (ptrace(PTRACE_SEIZE, victim->tid, NULL, (void *)PTRACE_O_TRACESYSGOOD))
		return fail(result, INJECT_SEIZE, errno);
	if (ptrace(PTRACE_INTERRUPT, victim->tid, NULL, NULL))
		return fail(result, INJECT_SEIZE, errno);
	for (;;) {
		int status = wait_stop(victim->tid);

		if (status < 0)
			return fail(result, INJECT_STOP, errno);
		victim->held_since = now_ns();
		if (status >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8))
			return 0;
		if (status >> 16 == PTRACE_EVENT_STOP) { /* group stop: somebody's SIGSTOP */
			ptrace(PTRACE_DETACH, victim->tid, NULL, NULL);
			return fail(result, INJECT_STOP, EBUSY);
		}
		/* A signal on its way; the interrupt is still due. */
		if (ptrace(PTRACE_CONT, victim->tid, NULL, (void *)(long)WSTOPSIG(status)))
			return fail(result, INJECT_STOP, errno);
	}
}

/* What the kernel does on the way back to user mode: arch_do_signal_or_restart(). */
static void fix_up_restart(struct user_regs_struct *regs)
{
	long number = (long)regs->orig_rax;

	if (number >= 0) {
		switch (-(long)regs->rax) {
		case 512: /* ERESTARTSYS */
		case 513: /* ERESTARTNOINTR */
		case 514: /* ERESTARTNOHAND */
			regs->rax = (unsigned long)number;
			regs->rip -= 2;
			break;
		case 516: /* ERESTART_RESTARTBLOCK */
			regs->rax = SYS_restart_syscall;
			regs->rip -= 2;
			break;
		}
	}
	regs->orig_rax = (unsigned long)-1;
}

static int stack_has_room(pid_t pid, uint64_t sp)
{
	char path[64], line[512];
	int found = 0;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	FILE *maps = fopen(path, "re");

	if (!maps)
		return 0;
	while (!found && fgets(line, sizeof(line), maps)) {
		unsigned long start, end;
		char perms[8];

		if (sscanf(line, "%lx-%lx %7s", &start, &end, perms) == 3 && start <= sp &&
		    sp <= end)
			found = perms[0] == 'r' && perms[1] == 'w' && sp - start >= STACK_ROOM
					? 1
					: -1;
	}
	fclose(maps);
	return found > 0;
}

static int inspect(struct victim *victim, struct inject_result *result)
{
	struct iovec xstate = { victim->xstate, XSTATE_MAX };

	if (ptrace(PTRACE_GETREGS, victim->tid, NULL, &victim->regs) ||
	    ptrace(PTRACE_GETSIGMASK, victim->tid, (void *)sizeof(victim->mask), &victim->mask) ||
	    ptrace(PTRACE_GETREGSET, victim->tid, (void *)NT_X86_XSTATE_NOTE, &xstate))
		return fail(result, INJECT_INSPECT, errno);
	if (victim->regs.cs != 0x33 || xstate.iov_len < XSAVE_HEADER_END)
		return fail(result, INJECT_INSPECT, ENOTSUP);
	if (!stack_has_room(victim->pid, victim->regs.rsp))
		return fail(result, INJECT_INSPECT, ENOSPC);
	fix_up_restart(&victim->regs);

	/* The form in which rt_sigreturn takes the FPU: fpu__restore_sig(). */
	struct fx_sw_bytes sw = { .magic1 = FP_XSTATE_MAGIC1,
				  .extended_size = (uint32_t)xstate.iov_len + sizeof(uint32_t),
				  .xstate_size = (uint32_t)xstate.iov_len };
	uint32_t magic2 = FP_XSTATE_MAGIC2;

	/* ptrace leaves the mask of features there: copy_xstate_to_uabi_buf(). */
	memcpy(&sw.xfeatures, victim->xstate + FXSAVE_SW_RESERVED, sizeof(sw.xfeatures));
	memcpy(victim->xstate + FXSAVE_SW_RESERVED, &sw, sizeof(sw));
	memcpy(victim->xstate + xstate.iov_len, &magic2, sizeof(magic2));
	victim->xstate_size = xstate.iov_len + sizeof(magic2);
	return 0;
}

static void lay_out(struct victim *victim, uint64_t image_size)
{
	uint64_t at = victim->regs.rsp - RED_ZONE;

	at = (at - victim->xstate_size) & ~63ull; /* XRSTOR wants 64 bytes */
	victim->xstate_at = at;
	at = (at - image_size) & ~63ull;
	victim->image_at = at;
	victim->chain_at = (at - sizeof(struct chain)) & ~63ull;
}

static uint64_t frame_at(const struct victim *victim, size_t index)
{
	return victim->chain_at + offsetof(struct chain, frames) +
	       index * sizeof(struct signal_frame);
}

static void apply_call(const struct victim *victim, const struct call *call, size_t index,
		       struct user_regs_struct *regs)
{
	*regs = victim->regs;
	regs->rax = (unsigned long)call->number;
	regs->rdi = call->args[0];
	regs->rsi = call->args[1];
	regs->rdx = call->args[2];
	regs->r10 = call->args[3];
	regs->r8 = call->args[4];
	regs->r9 = call->args[5];
	regs->rbx = call->rbx;
	regs->rip = victim->gadgets->syscall_ret;
	regs->rsp = frame_at(victim, index);
}

static void fill_frame(const struct victim *victim, struct signal_frame *frame,
		       const struct user_regs_struct *regs, uint64_t mask)
{
	*frame = (struct signal_frame){
		.restorer = victim->gadgets->sigreturn,
		.flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		/* An invalid mode: do_sigaltstack() then leaves the alternate stack alone. */
		.altstack.flags = 0x7f,
		.context = {
			.r8 = regs->r8, .r9 = regs->r9, .r10 = regs->r10, .r11 = regs->r11,
			.r12 = regs->r12, .r13 = regs->r13, .r14 = regs->r14, .r15 = regs->r15,
			.di = regs->rdi, .si = regs->rsi, .bp = regs->rbp, .bx = regs->rbx,
			.dx = regs->rdx, .ax = regs->rax, .cx = regs->rcx, .sp = regs->rsp,
			.ip = regs->rip, .flags = regs->eflags,
			.cs = (uint16_t)regs->cs, .ss = (uint16_t)regs->ss,
			.fpstate = victim->xstate_at,
		},
		.mask = mask,
	};
}

static int write_all(int fd, const void *data, size_t size, uint64_t at)
{
	return pwrite(fd, data, size, (off_t)at) == (ssize_t)size ? 0 : -1;
}

static int write_stack(const struct victim *victim, const struct call *calls, size_t count,
		       const void *image, uint64_t image_size, uint64_t area)
{
	struct user_regs_struct regs;
	struct chain chain = {
		.local = { { (void *)area, image_size } },
		.remote = { { (void *)victim->image_at, image_size } },
	};

	for (size_t i = 0; i + 1 < count; i++) {
		apply_call(victim, &calls[i + 1], i + 1, &regs);
		/* All signals wait: nothing else runs on this stack meanwhile. */
		fill_frame(victim, &chain.frames[i], &regs, ~0ull);
	}
	fill_frame(victim, &chain.frames[count - 1], &victim->regs, victim->mask);
	if (image_size && write_all(victim->mem_fd, image, image_size, victim->image_at))
		return -1;
	if (write_all(victim->mem_fd, victim->xstate, victim->xstate_size, victim->xstate_at))
		return -1;
	return write_all(victim->mem_fd, &chain, sizeof(chain), victim->chain_at);
}

/* Let the thread go on to the next system call stop. */
static int next_syscall_stop(pid_t tid)
{
	for (;;) {
		if (ptrace(PTRACE_SYSCALL, tid, NULL, NULL))
			return -1;
		int status = wait_stop(tid);

		if (status < 0)
			return -1;
		if (WSTOPSIG(status) == (SIGTRAP | 0x80))
			return 0;
		if (status >> 16 == PTRACE_EVENT_STOP)
			continue; /* somebody's SIGSTOP: it takes effect once we are gone */
		errno = EINTR; /* every signal is blocked; only a fatal one gets here */
		return -1;
	}
}

/* The chain is cut short: straight to its last frame, over an munmap if asked for. */
static void cut_short(const struct victim *victim, size_t count, uint64_t area,
		      uint64_t area_size)
{
	struct user_regs_struct regs;

	if (ptrace(PTRACE_GETREGS, victim->tid, NULL, &regs))
		return;
	regs.rsp = frame_at(victim, count - 1);
	regs.orig_rax = (unsigned long)-1;
	if (area_size) {
		regs.rax = SYS_munmap;
		regs.rdi = area;
		regs.rsi = area_size;
		regs.rip = victim->gadgets->syscall_ret;
	}
	ptrace(PTRACE_SETREGS, victim->tid, NULL, &regs);
}

static int run_chain(struct victim *victim, const struct call *calls, size_t count,
		     const void *image, uint64_t image_size, uint64_t area, uint64_t area_size,
		     struct inject_result *result)
{
	struct user_regs_struct regs;
	uint64_t all = ~0ull;
	int error = 0;

	if (write_stack(victim, calls, count, image, image_size, area))
		return fail(result, INJECT_WRITE, errno);
	apply_call(victim, &calls[0], 0, &regs);
	if (ptrace(PTRACE_SETREGS, victim->tid, NULL, &regs))
		return fail(result, INJECT_RESUME, errno);
	/* From here on the thread can do without us. */
	ptrace(PTRACE_SETSIGMASK, victim->tid, (void *)sizeof(all), &all);
	for (size_t i = 0; i < count; i++) {
		if (i && (next_syscall_stop(victim->tid) || next_syscall_stop(victim->tid)))
			return fail(result, INJECT_RESUME, errno); /* its rt_sigreturn */
		if (next_syscall_stop(victim->tid) || next_syscall_stop(victim->tid) ||
		    ptrace(PTRACE_GETREGS, victim->tid, NULL, &regs))
			return fail(result, INJECT_RESUME, errno);
		long returned = (long)regs.rax;

		if (returned < 0 && returned > -4096)
			error = (int)-returned;
		else if (calls[i].number == SYS_mmap && (uint64_t)returned != area)
			error = EEXIST; /* a kernel that takes a fixed address for a hint */
		else if (calls[i].number == SYS_process_vm_readv &&
			 (uint64_t)returned != image_size)
			error = EFAULT;
		if (error) {
			int mapped = calls[i].stage != INJECT_MMAP;

			if (error == EEXIST && returned > 0) {
				area = (uint64_t)returned;
				mapped = 1;
			}
			cut_short(victim, count, area, mapped ? area_size : 0);
			return fail(result, calls[i].stage, error);
		}
	}
	return 0;
}

static int inject(struct victim *victim, struct call *calls, size_t count, const void *image,
		  uint64_t image_size, uint64_t area, uint64_t area_size,
		  struct inject_result *result)
{
	int failed;

	*result = (struct inject_result){ 0 };
	if (seize(victim, result))
		return -1;
	failed = inspect(victim, result);
	if (!failed) {
		lay_out(victim, image_size);
		for (size_t i = 0; i < count; i++) {
			if (calls[i].number != SYS_process_vm_readv)
				continue;
			calls[i].args[1] = victim->chain_at + offsetof(struct chain, local);
			calls[i].args[3] = victim->chain_at + offsetof(struct chain, remote);
		}
		failed = run_chain(victim, calls, count, image, image_size, area, area_size,
				   result);
	}
	ptrace(PTRACE_DETACH, victim->tid, NULL, NULL);
	result->held_ns = now_ns() - victim->held_since;
	return failed;
}

int pf_inject_probe(int32_t pid, int32_t tid, int32_t mem_fd, const struct inject_gadgets *gadgets,
		 uint64_t area, struct inject_result *result)
{
	struct victim victim = { .pid = pid, .tid = tid, .mem_fd = mem_fd, .gadgets = gadgets };
	uint64_t page = 4096;
	struct call calls[] = {
		{ SYS_mmap,
		  { area, page, PROT_READ | PROT_EXEC,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, (uint64_t)-1, 0 },
		  0,
		  INJECT_MMAP },
		{ SYS_munmap, { area, page }, 0, INJECT_PROTECT },
	};

	return inject(&victim, calls, 2, NULL, 0, area, page, result);
}

int pf_inject_helper(int32_t pid, int32_t tid, int32_t own_pid, int32_t mem_fd,
		  const struct inject_gadgets *gadgets, uint64_t area, uint64_t area_size, const void *image,
		  uint64_t image_size, uint64_t code_size, struct inject_result *result)
{
	struct victim victim = { .pid = pid, .tid = tid, .mem_fd = mem_fd, .gadgets = gadgets };
	uint64_t control = area + code_size;
	uint64_t stack = control + offsetof(struct prefault_control, entry);
	/* What pthread_create() passes; QEMU's -sandbox spawn=deny allows just that. */
	unsigned long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |
			      CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID |
			      CLONE_CHILD_CLEARTID;
	uint64_t tid_at = control + offsetof(struct prefault_control, tid);
	struct call calls[] = {
		{ SYS_mmap,
		  { area, area_size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, (uint64_t)-1, 0 },
		  0,
		  INJECT_MMAP },
		/* From its own stack: a process may always read itself. */
		{ SYS_process_vm_readv, { (uint64_t)own_pid, 0, 1, 0, 1, 0 }, 0, INJECT_COPY },
		{ SYS_mprotect,
		  { area, code_size, PROT_READ | PROT_EXEC },
		  0,
		  INJECT_PROTECT },
		{ SYS_clone, { flags, stack, tid_at, tid_at, control }, control, INJECT_CLONE },
	};

	return inject(&victim, calls, 4, image, image_size, area, area_size, result);
}
