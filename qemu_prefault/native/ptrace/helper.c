// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The helper thread that the attach agent starts inside QEMU.
 *
 * The helper must not harm QEMU, even if the tool is killed:
 * - Its code, control page and stack are in a separate mapping.
 * - It blocks every signal except its tick.
 * - It never calls into QEMU or libc.
 * - It cannot fault. It directly accesses only its mapping. It accesses other memory with system
 *   calls, which return errors.
 * - When the tool releases it, or the tool's heartbeat stops, it unmaps its memory and exits.
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
#define SIGNAL_HIGHEST 64 /* signals tried for the tick, from high to low */
#define SIGNAL_LOWEST 40

#define IDLE_NS 300000u /* interval at which an idle helper looks for a batch */
#define IDLE_QUOTA_NS 5000000u
#define REST_MOST_NS 1000000000ull
#define REST_SLICE_NS 50000000ull /* interval at which a resting helper looks for an abort */

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
	uint64_t cpu_at;    /* the thread's CPU time at the last rest */
	int32_t tick_timer; /* -1: none */
	int32_t rests;	    /* whether to rest before each chunk */
	int32_t tool_pid;   /* 0: not visible to QEMU */
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
 * Return whether the tool is alive. If the tool is killed, kill() fails with ESRCH immediately. If
 * the tool hangs, is stopped, or is killed outside QEMU's PID namespace, only the heartbeat stops.
 */
static int tool_lives(struct helper *helper)
{
	struct prefault_control *control = helper->control;

	if (helper->tool_pid) {
		long result = prefault_syscall3(__NR_kill, helper->tool_pid, 0, 0);

		if (result == -ESRCH)
			return 0;
		if (result) /* a security module denies the call and may log it: do not repeat it */
			helper->tool_pid = 0;
	}

	uint64_t heartbeat = __atomic_load_n(&control->heartbeat, __ATOMIC_ACQUIRE);
	uint64_t now = prefault_now_ns();

	/*
	 * The time of a long chunk does not count, because the tool may be unable to update the
	 * heartbeat: a write to /proc/PID/mem takes QEMU's mmap_lock for reading. Populating holds
	 * this lock for reading, and a waiting writer (khugepaged) blocks new readers.
	 */
	if (heartbeat != helper->heartbeat || now - helper->looked_at > control->dead_man_ns / 3) {
		helper->heartbeat = heartbeat;
		helper->heartbeat_at = now;
	}
	helper->looked_at = now;
	return now - helper->heartbeat_at < control->dead_man_ns;
}

static void sleep_ns(uint64_t ns)
{
	struct {
		int64_t seconds, nanoseconds;
	} pause = { (int64_t)(ns / 1000000000u), (int64_t)(ns % 1000000000u) };

	prefault_syscall3(__NR_nanosleep, (long)&pause, 0, 0);
}

static uint64_t cpu_time_ns(void)
{
	struct {
		int64_t seconds, nanoseconds;
	} used = { 0 };

	prefault_syscall3(__NR_clock_gettime, CLOCK_THREAD_CPUTIME_ID, (long)&used, 0);
	return (uint64_t)used.seconds * 1000000000u + (uint64_t)used.nanoseconds;
}

/*
 * Rest in proportion to the CPU time since the last rest. If QEMU's threads have used up the CPU
 * quota of their cgroup, the kernel stops all of them, including QEMU's main loop.
 */
static void rest(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	uint64_t used = cpu_time_ns(), start = prefault_now_ns(), now = start, length;

	length = (used - helper->cpu_at) * load(&control->rest_percent) / 100;
	helper->cpu_at = used;
	if (length > REST_MOST_NS)
		length = REST_MOST_NS;
	while (now - start < length && load(&control->rest_percent) && !load(&control->abort) &&
	       !load(&control->vcpu_runs) && tool_lives(helper)) {
		uint64_t left = length - (now - start);

		sleep_ns(left < REST_SLICE_NS ? left : REST_SLICE_NS);
		now = prefault_now_ns();
	}
}

static int batch_goes_on(void *context)
{
	struct helper *helper = context;

	if (helper->rests)
		rest(helper);
	helper->control->chunk_started_ns = prefault_now_ns();
	return !load(&helper->control->abort) && !load(&helper->control->vcpu_runs) &&
	       tool_lives(helper);
}

static void run_batch(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	const struct prefault_hooks hooks = { batch_goes_on, 0, helper };
	uint32_t batch = load(&control->batch);
	uint32_t count = control->range_count;

	if (count > PREFAULT_RANGES_MAX)
		count = PREFAULT_RANGES_MAX;
	control->batch_started_ns = prefault_now_ns();
	for (uint32_t i = 0; i < count; i++) {
		struct prefault_limits limits = { control->limits.chunk_bytes,
						  control->limits.stuck_ns };

		helper->rests = load(&control->rest_percent) &&
				control->ranges[i].kind == PREFAULT_POPULATE;
		if (helper->rests && limits.chunk_bytes > control->rest_bytes)
			limits.chunk_bytes = control->rest_bytes;
		prefault_run_range(&control->ranges[i], control->vcpu_fd, &limits, &hooks);
		/* Only this vCPU is stuck. The tool retries the other ranges on another vCPU. */
		if (control->ranges[i].error == PREFAULT_STUCK)
			break;
	}
	if (!helper->rests)
		helper->cpu_at = cpu_time_ns(); /* a batch without rests causes none later */
	control->batch_finished_ns = prefault_now_ns();
	__atomic_store_n(&control->batch_done, batch, __ATOMIC_RELEASE);
}

/*
 * Unmap the helper's own code and stack, and exit. A "syscall; ret" in QEMU's text makes the
 * system call. The ret reads its target from a stack word that is always mapped and never used:
 * the null pointer at the end of the main stack (fs/exec.c, __bprm_mm_init()). The tool has
 * stored the address of an exit system call there.
 */
__attribute__((noreturn)) static void leave(struct helper *helper)
{
	struct prefault_control *control = helper->control;
	uint64_t all = ~0ull;

	prefault_syscall4(__NR_rt_sigprocmask, SIG_SETMASK_HOW, (long)&all, 0, sizeof(all));
	if (helper->tick_timer >= 0)
		prefault_syscall3(__NR_timer_delete, helper->tick_timer, 0, 0);
	/* Without this call, mm_release() (kernel/fork.c) would write to the unmapped memory. */
	prefault_syscall3(__NR_set_tid_address, 0, 0, 0);
	helper_unmap(control);
}

/*
 * Choose the signal for the tick: a real-time signal that QEMU does not use. The handler is only a
 * "ret" in libc. The handler stays installed, because with the default action, a pending tick would
 * kill QEMU. The next helper uses the same signal.
 */
static long claim_signal(const struct prefault_control *control)
{
	const struct helper_sigaction action = { .handler = control->syscall_ret + SYSCALL_BYTES,
						 .flags = SA_RESTORER_FLAG,
						 .restorer = control->sigreturn };
	struct helper_sigaction found = { 0 };

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

/* Set the thread's name and start its tick. Returns 0, or a negative errno. */
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

	uint64_t mask = ~(1ull << (signal - 1));

	prefault_syscall4(__NR_rt_sigprocmask, SIG_SETMASK_HOW, (long)&mask, 0, sizeof(mask));
	if (control->tick_ns)
		timer_start(helper->tick_timer, control->tick_ns);
	return 0;
}

__attribute__((noreturn, used)) void pf_helper_main(struct prefault_control *control)
{
	struct helper helper = { .control = control,
				 .heartbeat_at = prefault_now_ns(),
				 .tick_timer = -1,
				 .tool_pid = control->tool_pid };
	long result = prepare(&helper);

	__atomic_store_n(&control->ready, result ? (uint32_t)result : 1, __ATOMIC_RELEASE);
	while (!result && tool_lives(&helper)) {
		if (load(&control->batch) != control->batch_done)
			run_batch(&helper);
		else if (load(&control->release))
			break;
		else
			sleep_ns(load(&control->rest_percent) ? IDLE_QUOTA_NS : IDLE_NS);
	}
	leave(&helper);
}
