// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Make a thread of another process execute a few system calls, in such a way that nothing needs
 * to be undone if this process is killed at any instant.
 *
 * First, all data is written below the red zone of the thread's stack: one signal frame per
 * system call. Each frame holds the registers of the next call, and the last one holds the
 * thread's own registers. Then one PTRACE_SETREGS makes the thread execute "syscall; ret". The
 * ret jumps to libc's signal restorer, whose rt_sigreturn loads the next frame, and so on until
 * the thread has its own registers again. From PTRACE_SETREGS on, the thread finishes this chain
 * without us. We trace it only to cut the chain short if a call fails.
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arch_x86_64.h"
#include "control_page.h"

#define STACK_ROOM (128u << 10) /* must be free below the thread's stack pointer */
#define STOP_LIMIT_NS 2000000000ull
#define CALLS_MAX 4
#define PAGE 4096
#define ERRNO_MAX 4095
#define SYSCALL_STOP (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

struct call {
	long number;
	uint64_t args[6];
	uint64_t rbx; /* clone()'s child expects its control page there */
	int stage;
};

/* What is written to the thread's stack below the image and the FPU state. */
struct chain {
	struct signal_frame frames[CALLS_MAX];
	struct iovec local[1], remote[1];
};

struct victim {
	const struct inject_request *request;
	struct user_regs_struct regs; /* the thread's own, with any system call restart set up */
	uint64_t mask;
	size_t xstate_size;
	unsigned char xstate[ARCH_XSTATE_MAX + ARCH_XSTATE_TAIL]
		__attribute__((aligned(ARCH_STACK_ALIGN)));
	uint64_t chain_at, image_at, xstate_at; /* addresses on the thread's stack */
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

/* Wait for a ptrace stop. Returns its status, or -1 with errno set. */
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
			errno = ESRCH; /* the thread exited or was killed */
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

/* Seize and stop the thread. Signals that arrive meanwhile are delivered to it. */
static int seize(struct victim *victim, struct inject_result *result)
{
	pid_t tid = victim->request->tid;

	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)PTRACE_O_TRACESYSGOOD))
		return fail(result, INJECT_SEIZE, errno);
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return fail(result, INJECT_SEIZE, errno);
	for (;;) {
		int status = wait_stop(tid);

		if (status < 0)
			return fail(result, INJECT_STOP, errno);
		victim->held_since = now_ns();
		if (status >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8))
			return 0;
		if (status >> 16 ==
		    PTRACE_EVENT_STOP) { /* group stop: another process sent SIGSTOP */
			ptrace(PTRACE_DETACH, tid, NULL, NULL);
			return fail(result, INJECT_STOP, EBUSY);
		}
		/* A signal-delivery stop. The stop by PTRACE_INTERRUPT is still pending. */
		if (ptrace(PTRACE_CONT, tid, NULL, (void *)(long)WSTOPSIG(status)))
			return fail(result, INJECT_STOP, errno);
	}
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
			found = perms[0] == 'r' && perms[1] == 'w' && sp - start >= STACK_ROOM ? 1 :
												 -1;
	}
	fclose(maps);
	return found > 0;
}

static int inspect(struct victim *victim, struct inject_result *result)
{
	struct iovec xstate = { victim->xstate, ARCH_XSTATE_MAX };
	pid_t tid = victim->request->tid;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &victim->regs) ||
	    ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(victim->mask), &victim->mask) ||
	    ptrace(PTRACE_GETREGSET, tid, (void *)ARCH_XSTATE_NOTE, &xstate))
		return fail(result, INJECT_INSPECT, errno);
	if (!arch_usable(&victim->regs, xstate.iov_len))
		return fail(result, INJECT_INSPECT, ENOTSUP);
	if (!stack_has_room(victim->request->pid, arch_stack_pointer(&victim->regs)))
		return fail(result, INJECT_INSPECT, ENOSPC);
	arch_fix_up_restart(&victim->regs);
	victim->xstate_size = arch_seal_xstate(victim->xstate, xstate.iov_len);
	return 0;
}

static uint64_t align_down(uint64_t address)
{
	return address & ~(uint64_t)(ARCH_STACK_ALIGN - 1);
}

static void lay_out(struct victim *victim)
{
	uint64_t at = arch_free_stack(&victim->regs);

	at = align_down(at - victim->xstate_size);
	victim->xstate_at = at;
	at = align_down(at - victim->request->image_size);
	victim->image_at = at;
	victim->chain_at = align_down(at - sizeof(struct chain));
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
	arch_set_call(regs, call->number, call->args, call->rbx,
		      victim->request->gadgets.syscall_ret, frame_at(victim, index));
}

static void fill_frame(const struct victim *victim, struct signal_frame *frame,
		       const struct user_regs_struct *regs, uint64_t mask)
{
	arch_fill_frame(frame, regs, mask, victim->request->gadgets.sigreturn, victim->xstate_at);
}

static int write_all(int fd, const void *data, size_t size, uint64_t at)
{
	return pwrite(fd, data, size, (off_t)at) == (ssize_t)size ? 0 : -1;
}

static int write_stack(const struct victim *victim, const struct call *calls, size_t count)
{
	const struct inject_request *request = victim->request;
	struct user_regs_struct regs;
	struct chain chain = {
		.local = { { (void *)request->area, request->image_size } },
		.remote = { { (void *)victim->image_at, request->image_size } },
	};

	for (size_t i = 0; i + 1 < count; i++) {
		apply_call(victim, &calls[i + 1], i + 1, &regs);
		/* Block all signals, so that no handler runs on this stack during the chain. */
		fill_frame(victim, &chain.frames[i], &regs, ~0ull);
	}
	fill_frame(victim, &chain.frames[count - 1], &victim->regs, victim->mask);
	if (request->image_size &&
	    write_all(request->mem_fd, request->image, request->image_size, victim->image_at))
		return -1;
	if (write_all(request->mem_fd, victim->xstate, victim->xstate_size, victim->xstate_at))
		return -1;
	return write_all(request->mem_fd, &chain, sizeof(chain), victim->chain_at);
}

/* Resume the thread until its next system call stop. */
static int next_syscall_stop(pid_t tid)
{
	for (;;) {
		if (ptrace(PTRACE_SYSCALL, tid, NULL, NULL))
			return -1;
		int status = wait_stop(tid);

		if (status < 0)
			return -1;
		if (WSTOPSIG(status) == SYSCALL_STOP)
			return 0;
		if (status >> 16 == PTRACE_EVENT_STOP)
			continue; /* SIGSTOP: takes effect after we detach */
		errno = EINTR;	  /* all signals are blocked, so this one is fatal */
		return -1;
	}
}

/* Skip to the last frame of the chain. If area_size is not 0, unmap the area first. */
static void cut_short(const struct victim *victim, size_t count, uint64_t area, uint64_t area_size)
{
	struct user_regs_struct regs;

	if (ptrace(PTRACE_GETREGS, victim->request->tid, NULL, &regs))
		return;
	arch_skip_to(&regs, frame_at(victim, count - 1));
	if (area_size)
		arch_insert_munmap(&regs, area, area_size, victim->request->gadgets.syscall_ret);
	ptrace(PTRACE_SETREGS, victim->request->tid, NULL, &regs);
}

static int run_chain(struct victim *victim, const struct call *calls, size_t count,
		     struct inject_result *result)
{
	const struct inject_request *request = victim->request;
	struct user_regs_struct regs;
	pid_t tid = request->tid;
	uint64_t all = ~0ull, area = request->area;
	int error = 0;

	if (write_stack(victim, calls, count))
		return fail(result, INJECT_WRITE, errno);
	apply_call(victim, &calls[0], 0, &regs);
	if (ptrace(PTRACE_SETREGS, tid, NULL, &regs))
		return fail(result, INJECT_RESUME, errno);
	/* From here on the thread finishes the chain even if this process is killed. */
	ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(all), &all);
	for (size_t i = 0; i < count; i++) {
		if (i && (next_syscall_stop(tid) || next_syscall_stop(tid)))
			return fail(result, INJECT_RESUME,
				    errno); /* entry and exit of rt_sigreturn */
		if (next_syscall_stop(tid) || next_syscall_stop(tid) ||
		    ptrace(PTRACE_GETREGS, tid, NULL, &regs))
			return fail(result, INJECT_RESUME, errno);
		long returned = arch_result(&regs);

		if (returned < 0 && returned >= -ERRNO_MAX)
			error = (int)-returned;
		else if (calls[i].number == SYS_mmap && (uint64_t)returned != area)
			error = EEXIST; /* before Linux 4.17 MAP_FIXED_NOREPLACE is only a hint */
		else if (calls[i].number == SYS_process_vm_readv &&
			 (uint64_t)returned != request->image_size)
			error = EFAULT;
		if (error) {
			int mapped = calls[i].stage != INJECT_MMAP;

			if (error == EEXIST && returned > 0) {
				area = (uint64_t)returned;
				mapped = 1;
			}
			cut_short(victim, count, area, mapped ? request->area_size : 0);
			return fail(result, calls[i].stage, error);
		}
	}
	return 0;
}

static int inject(const struct inject_request *request, struct call *calls, size_t count,
		  struct inject_result *result)
{
	struct victim prepared = { .request = request }, *victim = &prepared;
	int failed;

	*result = (struct inject_result){ 0 };
	if (seize(victim, result))
		return -1;
	failed = inspect(victim, result);
	if (!failed) {
		lay_out(victim);
		for (size_t i = 0; i < count; i++) {
			if (calls[i].number != SYS_process_vm_readv)
				continue;
			calls[i].args[1] = victim->chain_at + offsetof(struct chain, local);
			calls[i].args[3] = victim->chain_at + offsetof(struct chain, remote);
		}
		failed = run_chain(victim, calls, count, result);
	}
	ptrace(PTRACE_DETACH, request->tid, NULL, NULL);
	result->held_ns = now_ns() - victim->held_since;
	return failed;
}

int pf_inject_probe(const struct inject_request *request, struct inject_result *result)
{
	struct inject_request probe = *request;
	uint64_t area = request->area;
	struct call calls[] = {
		{ SYS_mmap,
		  { area, PAGE, PROT_READ | PROT_EXEC,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, (uint64_t)-1, 0 },
		  0,
		  INJECT_MMAP },
		{ SYS_munmap, { area, PAGE }, 0, INJECT_PROTECT },
	};

	probe.area_size = PAGE;
	probe.image = NULL;
	probe.image_size = 0;
	return inject(&probe, calls, 2, result);
}

int pf_inject_helper(const struct inject_request *request, struct inject_result *result)
{
	uint64_t area = request->area;
	uint64_t control = area + request->code_size;
	uint64_t stack = control + offsetof(struct prefault_control, entry);
	/* The flags of pthread_create(): QEMU's -sandbox spawn=deny allows no other ones. */
	unsigned long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |
			      CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID |
			      CLONE_CHILD_CLEARTID;
	uint64_t tid_at = control + offsetof(struct prefault_control, tid);
	struct call calls[] = {
		{ SYS_mmap,
		  { area, request->area_size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, (uint64_t)-1, 0 },
		  0,
		  INJECT_MMAP },
		/* Copy from the thread's own stack: a process may always read its own memory. */
		{ SYS_process_vm_readv,
		  { (uint64_t)request->own_pid, 0, 1, 0, 1, 0 },
		  0,
		  INJECT_COPY },
		{ SYS_mprotect,
		  { area, request->code_size, PROT_READ | PROT_EXEC },
		  0,
		  INJECT_PROTECT },
		{ SYS_clone, { flags, stack, tid_at, tid_at, control }, control, INJECT_CLONE },
	};

	return inject(request, calls, 4, result);
}
