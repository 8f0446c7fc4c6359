// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The helper thread: what the attach agent starts inside QEMU.
 *
 * It must harm nobody whatever happens to the tool. So it has its own mapping
 * (code, control page, stack) that nobody else relies on, blocks every signal
 * but its own tick, never calls into QEMU or libc, cannot fault (its memory is
 * its own, everything else is reached through system calls that return errors),
 * and leaves without a trace when it is released or its heartbeat stops.
 */
#include <asm/signal.h>
#include <linux/time.h>

#include "common/prefault_loop.h"
#include "control_page.h"
#include "helper_x86_64.h"

#define PR_SET_NAME_OPTION 15
#define SIGEV_THREAD_ID_NOTIFY 4
#define SA_RESTORER_FLAG 0x04000000ul
#define SIG_SETMASK_HOW 2
#define SIGSET_BYTES 8
#define SIGNAL_HIGHEST 64 /* of those tried for the tick, high ones first */
#define SIGNAL_LOWEST 40

struct helper_sigaction {
	uint64_t handler, flags, restorer, mask;
};

struct helper_sigevent {
	uint64_t value;
	int32_t signal, notify, thread, padding[11];
};

struct helper {
	struct prefault_control *control;
	uint64_t heartbeat;
	uint64_t heartbeat_at;
	uint64_t looked_at;
	int32_t tick_timer;
	int32_t kick_timer; /* -1: none */
	int32_t tool_pid;   /* 0: nobody to ask for */
};

static inline uint32_t load(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void timer_start(int32_t timer, uint64_t interval_ns)
{
	struct {
		int64_t interval_s, interval_ns, value_s, value_ns;
	} when;

	when.interval_s = when.value_s = (int64_t)(interval_ns / 1000000000u);
	when.interval_ns = when.value_ns = (int64_t)(interval_ns % 1000000000u);
	prefault_syscall4(__NR_timer_settime, timer, 0, (long)&when, 0);
}

static long timer_make(int32_t signal, int32_t thread, int32_t *timer)
{
	struct helper_sigevent event = { .signal = signal,
					 .notify = SIGEV_THREAD_ID_NOTIFY,
					 .thread = thread };

	return prefault_syscall3(__NR_timer_create, PREFAULT_CLOCK_MONOTONIC, (long)&event,
				 (long)timer);
}

/*
 * Is the tool still there? Its process id tells at once when it was killed; the
 * heartbeat also when it hangs, is stopped, or cannot be seen from QEMU.
 */
static int tool_lives(struct helper *helper)
{
	struct prefault_control *control = helper->control;

	if (helper->tool_pid) {
		long result = prefault_syscall3(__NR_kill, helper->tool_pid, 0, 0);

		if (result == -ESRCH)
			return 0;
		if (result) /* a security module denies it, and may log that: ask once */
			helper->tool_pid = 0;
	}

	uint64_t heartbeat = __atomic_load_n(&control->heartbeat, __ATOMIC_ACQUIRE);
	uint64_t now = prefault_now_ns();

	/*
	 * A chunk can take so long that the tool could not get through meanwhile: it writes by
	 * way of QEMU's mmap_lock, which populating holds and THP's khugepaged waits for.
	 */
	if (heartbeat != helper->heartbeat || now - helper->looked_at > control->dead_man_ns / 3) {
		helper->heartbeat = heartbeat;
		helper->heartbeat_at = now;
	}
	helper->looked_at = now;
	return now - helper->heartbeat_at < control->dead_man_ns;
}

static int batch_goes_on(void *context)
{
	struct helper *helper = context;

	helper->control->chunk_started_ns = prefault_now_ns();
	return !load(&helper->control->abort) && tool_lives(helper);
}

static void arm_kick(void *context)
{
	struct helper *helper = context;

	/*
	 * The ioctl starts with mutex_lock_killable(&vcpu->mutex), which no signal
	 * of ours ends. If the guest is resumed under us, KVM_RUN holds that mutex
	 * even in HLT: QEMU's own IPI signal makes the vCPU thread let go of it.
	 */
	if (helper->kick_timer >= 0)
		timer_start(helper->kick_timer, helper->control->kick_ns);
}

static void run_batch(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	const struct prefault_hooks hooks = { batch_goes_on, arm_kick, helper };
	uint32_t batch = load(&control->batch);
	uint32_t count = control->range_count;

	if (count > PREFAULT_RANGES_MAX)
		count = PREFAULT_RANGES_MAX;
	control->batch_started_ns = prefault_now_ns();
	for (uint32_t i = 0; i < count; i++) {
		prefault_run_range(&control->ranges[i], control->vcpu_fd, &control->limits, &hooks);
		/* The vCPU is the matter, not the range: leave the rest to another one. */
		if (control->ranges[i].error == PREFAULT_STUCK)
			break;
	}
	if (helper->kick_timer >= 0)
		timer_start(helper->kick_timer, 0);
	control->batch_finished_ns = prefault_now_ns();
	__atomic_store_n(&control->batch_done, batch, __ATOMIC_RELEASE);
}

/*
 * Unmap the ground we stand on. The system call is made by QEMU's own text, its
 * "ret" takes the next address from the one stack word that is always there and
 * never used: the null pointer with which the kernel ends the main stack
 * (fs/exec.c, __bprm_mm_init()); the tool put the address of an exit in it.
 */
__attribute__((noreturn)) static void leave(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	uint64_t all = ~0ull;

	prefault_syscall4(__NR_rt_sigprocmask, SIG_SETMASK_HOW, (long)&all, 0, sizeof(all));
	if (helper->tick_timer >= 0)
		prefault_syscall3(__NR_timer_delete, helper->tick_timer, 0, 0);
	if (helper->kick_timer >= 0)
		prefault_syscall3(__NR_timer_delete, helper->kick_timer, 0, 0);
	/* Else the kernel would clear a word in memory that is no longer ours. */
	prefault_syscall3(__NR_set_tid_address, 0, 0, 0);
	helper_unmap(control);
}

/*
 * The tick's signal: a real-time one that QEMU does not use. Its handler is a
 * bare "ret" in libc and stays installed, also for the next helper: with the
 * default action back, a tick still under way would end QEMU.
 */
static long claim_signal(const struct prefault_control *control)
{
	const struct helper_sigaction action = { .handler = control->syscall_ret + SYSCALL_BYTES,
						 .flags = SA_RESTORER_FLAG,
						 .restorer = control->sigreturn };
	struct helper_sigaction found;

	for (long signal = SIGNAL_HIGHEST; signal >= SIGNAL_LOWEST; signal--) {
		if (prefault_syscall4(__NR_rt_sigaction, signal, 0, (long)&found, SIGSET_BYTES))
			continue;
		if (found.handler == action.handler)
			return signal;
		if (!found.handler &&
		    !prefault_syscall4(__NR_rt_sigaction, signal, (long)&action, 0, SIGSET_BYTES))
			return signal;
	}
	return -EBUSY;
}

/* 0, or a negative errno when this thread cannot be interrupted in time. */
static long prepare(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	char name[16] = { 'q', 'e', 'm', 'u', '-', 'p', 'r', 'e', 'f', 'a', 'u', 'l', 't', 0 };
	int32_t self = (int32_t)control->tid;
	long signal = claim_signal(control);
	long result;

	prefault_syscall3(__NR_prctl, PR_SET_NAME_OPTION, (long)name, 0);
	if (signal < 0)
		return signal;
	control->tick_signal = (uint32_t)signal;
	result = control->tick_ns ? timer_make((int32_t)signal, self, &helper->tick_timer) : 0;
	if (result)
		return result;
	if (control->tick_ns && control->vcpu_tid &&
	    timer_make(control->kick_signal, control->vcpu_tid, &helper->kick_timer))
		helper->kick_timer = -1;

	uint64_t mask = ~(1ull << (signal - 1));

	prefault_syscall4(__NR_rt_sigprocmask, SIG_SETMASK_HOW, (long)&mask, 0, sizeof(mask));
	if (control->tick_ns)
		timer_start(helper->tick_timer, control->tick_ns);
	return 0;
}

__attribute__((noreturn, used)) void pf_helper_main(struct prefault_control *control)
{
	struct {
		int64_t seconds, nanoseconds;
	} pause = { 0, 300000 };
	struct helper helper = { .control = control,
				 .heartbeat_at = prefault_now_ns(),
				 .tick_timer = -1,
				 .kick_timer = -1,
				 .tool_pid = control->tool_pid };
	long result = prepare(&helper);

	__atomic_store_n(&control->ready, result ? (uint32_t)result : 1, __ATOMIC_RELEASE);
	while (!result && tool_lives(&helper)) {
		if (load(&control->batch) != control->batch_done)
			run_batch(&helper);
		else if (load(&control->release))
			break;
		else
			prefault_syscall3(__NR_nanosleep, (long)&pause, 0, 0);
	}
	leave(&helper);
}
