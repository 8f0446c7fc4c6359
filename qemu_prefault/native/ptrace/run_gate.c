// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "run_gate.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arch_x86_64.h"
#include "control_page.h"
#include "tracee.h"

#define KVM_RUN_IOCTL 0xae80u /* _IO(KVMIO, 0x80), include/uapi/linux/kvm.h */
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define EVENT_OF(status) ((status) >> 16)
#define IDLE_LIMIT_NS 5000000000ull
#define HOLD_LIMIT_NS 3000000000ull
#define LATE_STOP_LIMIT_NS 50000000ull
#define IDLE_POLL_NS 100000

/*
 * The gate closes all other descriptors, so that the tool's connections are closed when the tool
 * exits.
 */
enum { GATE_SOCKET, GATE_MEMORY, GATE_PROC, GATE_SIGNALS };

struct gate {
	struct pf_target target;
	struct run_gate_vcpu vcpus[RUN_GATE_VCPUS_MAX];
	uint32_t count;
	bool traced[RUN_GATE_VCPUS_MAX];
};

static bool read_word(const struct run_gate_vcpu *vcpu, size_t field, uint32_t *value)
{
	uint64_t magic;

	return pread(GATE_MEMORY, &magic, sizeof(magic),
		     (off_t)(vcpu->control + offsetof(struct prefault_control, magic))) ==
		       sizeof(magic) &&
	       magic == PREFAULT_CONTROL_MAGIC &&
	       pread(GATE_MEMORY, value, sizeof(*value), (off_t)(vcpu->control + field)) ==
		       sizeof(*value);
}

/* Return whether the helper is processing a batch. Returns false if the helper has exited. */
static bool is_busy(const struct run_gate_vcpu *vcpu)
{
	uint32_t batch, done;

	return read_word(vcpu, offsetof(struct prefault_control, batch), &batch) &&
	       read_word(vcpu, offsetof(struct prefault_control, batch_done), &done) &&
	       batch != done;
}

/*
 * End the helpers' work permanently, and wait up to IDLE_LIMIT_NS until it has ended. The wait is
 * limited because a helper may be blocked inside the ioctl. In this case, KVM_RUN waits for the
 * ioctl (vcpu->mutex).
 */
static void end_work(const struct gate *gate)
{
	const struct timespec pause = { 0, IDLE_POLL_NS };
	const uint64_t deadline = pf_now_ns() + IDLE_LIMIT_NS;
	const uint32_t yes = 1;

	for (uint32_t i = 0; i < gate->count; i++) {
		const struct run_gate_vcpu *vcpu = &gate->vcpus[i];
		uint32_t unused;

		if (read_word(vcpu, offsetof(struct prefault_control, vcpu_runs), &unused))
			(void)!pwrite(GATE_MEMORY, &yes, sizeof(yes),
				      (off_t)(vcpu->control +
					      offsetof(struct prefault_control, vcpu_runs)));
	}
	for (uint32_t i = 0; i < gate->count; i++)
		while (is_busy(&gate->vcpus[i]) && pf_now_ns() < deadline)
			nanosleep(&pause, NULL);
}

/*
 * Stop tracing all threads. A thread must be in a ptrace stop to be detached. All threads together
 * have STOP_LIMIT_NS to stop, and then each has LATE_STOP_LIMIT_NS. A thread that stops even later
 * continues (handle_stop()), and the kernel detaches it when the gate exits.
 */
static void detach_all(struct gate *gate)
{
	const uint64_t deadline = pf_now_ns() + STOP_LIMIT_NS;

	for (uint32_t i = 0; i < gate->count; i++) {
		int32_t tid = gate->vcpus[i].tid;
		uint64_t least = pf_now_ns() + LATE_STOP_LIMIT_NS;
		int status;

		if (!gate->traced[i])
			continue;
		gate->traced[i] = false;
		if (!ptrace(PTRACE_DETACH, tid, NULL, NULL) ||
		    ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
			continue;
		status = pf_wait_stop_until(tid, least > deadline ? least : deadline);
		if (status < 0)
			continue;
		/* If this stop is a signal delivery stop, deliver the signal. */
		ptrace(PTRACE_DETACH, tid, NULL,
		       (void *)(long)(EVENT_OF(status) || WSTOPSIG(status) == SYSCALL_STOP ?
					      0 :
					      WSTOPSIG(status)));
	}
}

static void answer(char byte)
{
	(void)!write(GATE_SOCKET, &byte, 1);
}

/* Let the vCPUs run. */
static void open_gate(struct gate *gate)
{
	end_work(gate);
	detach_all(gate);
	answer(RUN_GATE_OPEN);
}

/* Return whether a stopped thread is in KVM_RUN, or about to enter it. */
static bool is_in_kvm_run(int32_t tid)
{
	struct user_regs_struct regs;

	return ptrace(PTRACE_GETREGS, tid, NULL, &regs) == 0 && arch_is_ioctl(&regs, KVM_RUN_IOCTL);
}

/* Handle one stop of a traced thread. Returns whether the gate must open. */
static bool handle_stop(int32_t tid, int status)
{
	int signal = WSTOPSIG(status);

	if (signal == SYSCALL_STOP) {
		if (is_in_kvm_run(tid))
			return true;
		signal = 0;
	} else if (EVENT_OF(status) == PTRACE_EVENT_STOP && signal != SIGTRAP) {
		ptrace(PTRACE_LISTEN, tid, NULL, NULL); /* QEMU was stopped by SIGSTOP */
		return false;
	} else if (EVENT_OF(status)) {
		signal = 0;
	}
	ptrace(PTRACE_SYSCALL, tid, NULL, (void *)(long)signal);
	return false;
}

static void handle_stops(struct gate *gate)
{
	int32_t tid;
	int status;

	while ((tid = waitpid(-1, &status, __WALL | WNOHANG)) > 0) {
		if (WIFSTOPPED(status) && handle_stop(tid, status)) {
			open_gate(gate);
			return;
		}
		for (uint32_t i = 0; i < gate->count; i++)
			if (gate->vcpus[i].tid == tid && !WIFSTOPPED(status))
				gate->traced[i] = false; /* the thread has exited */
	}
}

/*
 * Trace the threads, and stop each of them once. If a thread is in KVM_RUN, open the gate. The limit
 * applies to all threads together, because each thread can take almost STOP_LIMIT_NS.
 */
static void hold(struct gate *gate)
{
	const uint64_t deadline = pf_now_ns() + HOLD_LIMIT_NS;

	for (uint32_t i = 0; i < gate->count; i++) {
		int32_t tid = gate->vcpus[i].tid;
		struct inject_result result = { 0 };
		int failed = pf_now_ns() > deadline ? pf_fail(&result, INJECT_STOP, ETIMEDOUT) :
						      pf_seize(&gate->target, tid, &result);

		if (failed) {
			detach_all(gate);
			answer(RUN_GATE_FAILED);
			(void)!write(GATE_SOCKET, &result.error, sizeof(result.error));
			return;
		}
		gate->traced[i] = true;
		if (is_in_kvm_run(tid)) {
			open_gate(gate);
			return;
		}
		ptrace(PTRACE_SYSCALL, tid, NULL, NULL);
	}
	answer(RUN_GATE_HELD);
}

__attribute__((noreturn)) static void run(struct gate *gate)
{
	struct pollfd events[] = { { .fd = GATE_SOCKET, .events = POLLIN },
				   { .fd = GATE_SIGNALS, .events = POLLIN } };
	struct signalfd_siginfo ignored;
	char command;

	for (;;) {
		if (poll(events, 2, -1) < 0)
			continue;
		if (events[1].revents) {
			(void)!read(GATE_SIGNALS, &ignored, sizeof(ignored));
			handle_stops(gate);
		}
		if (events[0].revents) {
			if (read(GATE_SOCKET, &command, 1) != 1)
				break; /* the tool has closed the gate or has exited */
			if (command == RUN_GATE_HOLD) {
				hold(gate);
			} else {
				detach_all(gate);
				answer(RUN_GATE_RELEASED);
			}
		}
	}
	for (uint32_t i = 0; i < gate->count; i++)
		if (is_busy(&gate->vcpus[i]))
			end_work(gate);
	detach_all(gate);
	_exit(0);
}

/*
 * In the child: keep three descriptors, and block all signals. This function makes only system
 * calls, because another thread of the tool may have held a libc lock during the fork().
 */
static bool become_gate(struct gate *gate, int32_t socket)
{
	int low_socket = fcntl(socket, F_DUPFD, GATE_SIGNALS + 1);
	int low_memory = fcntl(gate->target.mem_fd, F_DUPFD, GATE_SIGNALS + 1);
	int low_proc = fcntl(gate->target.proc_dir, F_DUPFD, GATE_SIGNALS + 1);
	sigset_t child, all;

	gate->target.mem_fd = GATE_MEMORY;
	gate->target.proc_dir = GATE_PROC;
	sigfillset(&all);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	signal(SIGCHLD, SIG_DFL); /* if SIGCHLD were ignored, no stop would be reported */
	setsid();
	prctl(PR_SET_NAME, "prefault-gate");
	if (dup2(low_socket, GATE_SOCKET) < 0 || dup2(low_memory, GATE_MEMORY) < 0 ||
	    dup2(low_proc, GATE_PROC) < 0)
		return false;
	close(GATE_SIGNALS);
	if (sigprocmask(SIG_BLOCK, &all, NULL) || signalfd(-1, &child, 0) != GATE_SIGNALS)
		return false;
	return syscall(SYS_close_range, GATE_SIGNALS + 1, ~0u, 0) == 0;
}

int32_t pf_run_gate_start(int32_t socket, const struct pf_target *target,
			  const struct run_gate_vcpu *vcpus, uint32_t count)
{
	struct gate gate = { .target = *target, .count = count };

	if (count > RUN_GATE_VCPUS_MAX)
		return -E2BIG;
	memcpy(gate.vcpus, vcpus, count * sizeof(*vcpus));

	int32_t child = fork();

	if (child == 0) {
		if (become_gate(&gate, socket))
			run(&gate);
		_exit(1);
	}
	return child < 0 ? -errno : child;
}
