// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Make a thread of another process execute a few system calls. If this process is killed at any
 * time, the thread still gets its own registers back.
 *
 * First, this process writes one signal frame per system call below the red zone of the thread's
 * stack. The last frame contains the thread's own registers, and each other frame contains the
 * registers of the next call. Then one PTRACE_SETREGS makes the thread execute "syscall; ret". The
 * ret jumps to libc's signal restorer, whose rt_sigreturn loads the next frame. This repeats until
 * the thread has its own registers again. After PTRACE_SETREGS, the thread finishes this chain
 * without a tracer. This process traces the thread only to skip the rest of the chain if a call
 * fails.
 *
 * The chain contains only system calls that QEMU also makes, because a seccomp filter may kill QEMU
 * for other calls. The chain maps the helper's memory and unmaps it again. While the thread is
 * stopped at the end of the last mmap(), this process writes the helper's image to the new mapping
 * and starts the helper: a second PTRACE_SETREGS replaces munmap() with clone(). After munmap() or
 * clone(), the thread continues with the last frame.
 */
#define _GNU_SOURCE
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
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
#include <unistd.h>

#include "arch_x86_64.h"
#include "control_page.h"
#include "tracee.h"

#define STACK_SPARE (4u << 10) /* bytes that must stay free below the frames */
#define CALLS_MAX 3
#define PAGE 4096
#define ERRNO_MAX 4095
#define SYSCALL_STOP (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

struct call {
	long number;
	uint64_t args[6];
	uint64_t rbx; /* the child of clone() expects the address of its control page here */
};

/* The data on the thread's stack below the FPU state. */
struct chain {
	struct signal_frame frames[CALLS_MAX];
};

struct victim {
	const struct inject_request *request;
	struct user_regs_struct regs; /* the thread's own, prepared to restart its system call */
	uint64_t mask;
	size_t xstate_size;
	unsigned char xstate[ARCH_XSTATE_MAX + ARCH_XSTATE_TAIL]
		__attribute__((aligned(ARCH_STACK_ALIGN)));
	uint64_t chain_at, xstate_at; /* addresses on the thread's stack */
};

/* Return the size of sp's mapping below sp, or 0 if the mapping is not readable and writable. */
static uint64_t stack_left(const struct pf_target *target, uint64_t sp)
{
	char line[512];
	uint64_t left = 0;
	int continues = 0; /* the line is the rest of a long line, which is the name of a file */
	int fd = openat(target->proc_dir, "maps", O_RDONLY | O_CLOEXEC);
	FILE *maps = fd < 0 ? NULL : fdopen(fd, "r");

	if (!maps) {
		if (fd >= 0)
			close(fd);
		return 0;
	}
	while (fgets(line, sizeof(line), maps)) {
		unsigned long start, end;
		char perms[8];
		int rest = continues;

		continues = !strchr(line, '\n');
		if (rest || sscanf(line, "%lx-%lx %7s", &start, &end, perms) != 3 || sp < start ||
		    sp > end)
			continue;
		left = perms[0] == 'r' && perms[1] == 'w' ? sp - start : 0;
		break;
	}
	fclose(maps);
	return left;
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
	victim->chain_at = align_down(at - sizeof(struct chain));
}

static int inspect(struct victim *victim, struct inject_result *result)
{
	struct iovec xstate = { victim->xstate, ARCH_XSTATE_MAX };
	struct xsave_feature features[XSAVE_FEATURES];
	pid_t tid = victim->request->tid;

	if (ptrace(PTRACE_GETREGS, tid, NULL, &victim->regs) ||
	    ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(victim->mask), &victim->mask) ||
	    ptrace(PTRACE_GETREGSET, tid, (void *)ARCH_XSTATE_NOTE, &xstate))
		return pf_fail(result, INJECT_INSPECT, errno);
	if (!arch_usable(&victim->regs, xstate.iov_len))
		return pf_fail(result, INJECT_INSPECT, ENOTSUP);
	arch_fix_up_restart(&victim->regs);
	arch_read_features(features);
	victim->xstate_size = arch_seal_xstate(victim->xstate, xstate.iov_len, features);
	lay_out(victim);
	result->stack_left =
		stack_left(&victim->request->target, arch_stack_pointer(&victim->regs));
	result->stack_needed = arch_stack_pointer(&victim->regs) - victim->chain_at + STACK_SPARE;
	if (result->stack_left < result->stack_needed)
		return pf_fail(result, INJECT_INSPECT, ENOSPC);
	return 0;
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
	struct chain chain = { 0 };

	for (size_t i = 0; i + 1 < count; i++) {
		apply_call(victim, &calls[i + 1], i + 1, &regs);
		/* Block all signals, so that no handler runs on this stack during the chain. */
		fill_frame(victim, &chain.frames[i], &regs, ~0ull);
	}
	fill_frame(victim, &chain.frames[count - 1], &victim->regs, victim->mask);
	if (write_all(request->target.mem_fd, victim->xstate, victim->xstate_size,
		      victim->xstate_at))
		return -1;
	return write_all(request->target.mem_fd, &chain, sizeof(chain), victim->chain_at);
}

/*
 * Write to the thread's memory even if the mapping is read-only. proc_mem.force_override= (Linux
 * 6.12) can deny this through /proc/PID/mem, but not with ptrace (generic_ptrace_pokedata(),
 * kernel/ptrace.c).
 */
static int write_forced(const struct inject_request *request, const void *data, size_t size,
			uint64_t at)
{
	if (write_all(request->target.mem_fd, data, size, at) == 0)
		return 0;
	for (size_t done = 0; done < size; done += sizeof(long)) {
		long word;

		memcpy(&word, (const char *)data + done, sizeof(word));
		if (ptrace(PTRACE_POKEDATA, request->tid, (void *)(at + done), (void *)word))
			return -1;
	}
	return 0;
}

static int write_image(const struct inject_request *request)
{
	const char *image = request->image;
	uint64_t control = request->area + request->code_size;

	if (write_forced(request, image, request->code_size, request->area))
		return -1;
	return write_all(request->target.mem_fd, image + request->code_size,
			 request->image_size - request->code_size, control);
}

/* Resume the thread until its next system call stop. */
static int next_syscall_stop(pid_t tid)
{
	for (;;) {
		if (ptrace(PTRACE_SYSCALL, tid, NULL, NULL))
			return -1;
		int status = pf_wait_stop(tid);

		if (status < 0)
			return -1;
		if (WSTOPSIG(status) == SYSCALL_STOP)
			return 0;
		if (status >> 16 == PTRACE_EVENT_STOP)
			continue; /* SIGSTOP: it takes effect after PTRACE_DETACH */
		errno = EINTR;	  /* all signals are blocked: this one is fatal */
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

/* Wait for the end of a system call. Stores its result in *returned. */
static int finish_call(pid_t tid, long *returned)
{
	struct user_regs_struct regs;

	if (next_syscall_stop(tid) || next_syscall_stop(tid) ||
	    ptrace(PTRACE_GETREGS, tid, NULL, &regs))
		return -1;
	*returned = arch_result(&regs);
	return 0;
}

/* Write the frames and start the first call. Afterwards, the thread needs no tracer. */
static int start_chain(struct victim *victim, const struct call *calls, size_t count,
		       struct inject_result *result)
{
	struct user_regs_struct regs;
	pid_t tid = victim->request->tid;
	uint64_t all = ~0ull;

	if (write_stack(victim, calls, count))
		return pf_fail(result, INJECT_WRITE, errno);
	apply_call(victim, &calls[0], 0, &regs);
	if (ptrace(PTRACE_SETREGS, tid, NULL, &regs))
		return pf_fail(result, INJECT_RESUME, errno);
	/* Afterwards, the thread finishes the chain even if this process is killed. */
	ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(all), &all);
	return 0;
}

/* Wait for the first `watched` calls of the chain. If one fails, cut the chain short. */
static int watch_chain(struct victim *victim, const struct call *calls, size_t watched,
		       size_t count, struct inject_result *result)
{
	const struct inject_request *request = victim->request;

	for (size_t i = 0; i < watched; i++) {
		uint64_t area = request->area, area_size = request->area_size;
		pid_t tid = request->tid;
		long returned;
		int error = 0;

		if (i && (next_syscall_stop(tid) || next_syscall_stop(tid)))
			return pf_fail(result, INJECT_RESUME,
				       errno); /* entry and exit of rt_sigreturn */
		if (finish_call(tid, &returned))
			return pf_fail(result, INJECT_RESUME, errno);
		if (returned < 0 && returned >= -ERRNO_MAX) {
			error = (int)-returned;
			area_size = i ? area_size : 0;
		} else if (calls[i].number == SYS_mmap && (uint64_t)returned != calls[i].args[0]) {
			error = EEXIST; /* before Linux 4.17, the address is only a hint */
			area = (uint64_t)returned;
			area_size = calls[i].args[1];
		}
		if (error) {
			cut_short(victim, count, area, area_size);
			return pf_fail(result, INJECT_MMAP, error);
		}
	}
	return 0;
}

/* Start the helper: after the chain's last mmap(), replace munmap() with clone(). */
static int start_helper(struct victim *victim, const struct call *clone, size_t count,
			struct inject_result *result)
{
	const struct inject_request *request = victim->request;
	struct user_regs_struct regs;
	long returned;

	if (write_image(request))
		return pf_fail(result, INJECT_IMAGE, errno); /* the chain continues with munmap() */
	apply_call(victim, clone, count - 1, &regs);
	if (ptrace(PTRACE_SETREGS, request->tid, NULL, &regs) ||
	    finish_call(request->tid, &returned))
		return pf_fail(result, INJECT_RESUME, errno);
	if (returned < 0) {
		cut_short(victim, count, request->area, request->area_size);
		return pf_fail(result, INJECT_CLONE, (int)-returned);
	}
	return 0;
}

static int inject(const struct inject_request *request, const struct call *calls, size_t count,
		  const struct call *clone, struct inject_result *result)
{
	struct victim prepared = { .request = request }, *victim = &prepared;
	int failed;

	*result = (struct inject_result){ 0 };
	if (pf_seize(&request->target, request->tid, result))
		return -1;
	uint64_t held_since = pf_now_ns();

	failed = inspect(victim, result) || start_chain(victim, calls, count, result) ||
		 watch_chain(victim, calls, clone ? count - 1 : count, count, result) ||
		 (clone && start_helper(victim, clone, count, result));
	ptrace(PTRACE_DETACH, request->tid, NULL, NULL);
	result->held_ns = pf_now_ns() - held_since;
	return failed ? -1 : 0;
}

int pf_inject_munmap(const struct inject_request *request, struct inject_result *result)
{
	const struct call calls[] = {
		{ SYS_munmap, { request->area, request->area_size }, 0 },
	};

	return inject(request, calls, 1, NULL, result);
}

int pf_inject_helper(const struct inject_request *request, struct inject_result *result)
{
	const uint64_t map_flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	uint64_t area = request->area;
	uint64_t control = area + request->code_size;
	uint64_t stack = control + offsetof(struct prefault_control, entry);
	/*
	 * Use the flags of pthread_create(), because QEMU's -sandbox spawn=deny denies other flags.
	 */
	const unsigned long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND |
				    CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |
				    CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
	uint64_t tid_at = control + offsetof(struct prefault_control, tid);
	/*
	 * Map the code executable from the start, because PR_SET_MDWE and systemd's
	 * MemoryDenyWriteExecute= deny mprotect() with PROT_EXEC.
	 */
	const struct call calls[] = {
		{ SYS_mmap,
		  { area, request->code_size, PROT_READ | PROT_EXEC, map_flags, (uint64_t)-1, 0 },
		  0 },
		{ SYS_mmap,
		  { control, request->area_size - request->code_size, PROT_READ | PROT_WRITE,
		    map_flags, (uint64_t)-1, 0 },
		  0 },
		{ SYS_munmap, { area, request->area_size }, 0 },
	};
	const struct call clone = { SYS_clone, { flags, stack, tid_at, tid_at, control }, control };

	return inject(request, calls, 3, &clone, result);
}
