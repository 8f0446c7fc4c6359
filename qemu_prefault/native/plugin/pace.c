// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "pace.h"

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/headroom.h"
#include "common/limits.h"
#include "common/prefault_loop.h"
#include "os.h"

/* Defined here because <sched.h> does not define it. */
#define POLICY_DEADLINE 6

#define READ_EVERY MS(100)
/* The part of the smallest quota that a thread may use, beside a running and a waiting guest. */
#define PART 0.25
#define PART_IF_WAITING 0.75
/* The part of a CPU that a thread with a real-time policy may use. */
#define REALTIME_SHARE 0.1
#define REALTIME_SHARE_IF_WAITING 0.5
#define REALTIME_PIECE MS(1)
#define LEAST_PIECE (MS(1) / 10)
#define MOST_LEVELS 16

static struct {
	int directory; /* of QEMU's cgroup */
	int levels;    /* the cgroup and its ancestors */
	bool unified;
} group = { .directory = -1 };

static _Atomic(const char *) reason;

void pf_pace_use_group(int directory, int ancestors, bool unified)
{
	group.directory = directory;
	group.levels = ancestors + 1;
	group.unified = unified;
}

void pf_pace_open(void)
{
	static struct headroom_group found;
	int directory, ancestors = 0;

	if (group.directory >= 0)
		close(group.directory); /* after a fork, this is the parent's cgroup */
	group.directory = -1;
	if (!pf_headroom_find_group("/proc/self/cgroup", "/proc/self/mountinfo", "cpu", &found))
		return;
	directory = open(found.directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	while (ancestors < MOST_LEVELS - 1 && pf_headroom_parent(&found))
		ancestors++;
	pf_pace_use_group(directory, ancestors, found.unified);
}

void pf_pace_start(struct pace *pace)
{
	pace->may_set = !pf_has_seccomp_filter();
}

static bool read_file(int level, const char *name, char *text, size_t size)
{
	return pf_limits_read_level(group.directory, (uint32_t)level, name, text, (uint32_t)size) >
	       0;
}

/* Read the quota of one level in microseconds per period. Returns false if it is unlimited. */
static bool read_quota(int level, long long *quota, long long *period)
{
	char text[64], *end;

	if (!read_file(level, group.unified ? "cpu.max" : "cpu.cfs_quota_us", text, sizeof(text)))
		return false;
	*quota = strtoll(text, &end, 10); /* "max" and -1 mean no limit */
	if (*quota <= 0)
		return false;
	if (!group.unified) {
		if (!read_file(level, "cpu.cfs_period_us", text, sizeof(text)))
			return false;
		end = text;
	}
	*period = strtoll(end, NULL, 10);
	return *period > 0;
}

static void read_quotas(struct pace *pace)
{
	long long quota, period;

	pace->quota = 0;
	pace->quota_ns = UINT64_MAX;
	for (int level = 0; group.directory >= 0 && level < group.levels; level++) {
		if (!read_quota(level, &quota, &period))
			continue;
		double cpus = (double)quota / (double)period;

		if (!pace->quota || cpus < pace->quota)
			pace->quota = cpus;
		if ((uint64_t)quota * 1000 < pace->quota_ns)
			pace->quota_ns = (uint64_t)quota * 1000;
	}
}

/*
 * Return whether the thread has a real-time policy and cannot change it. An operator may set the
 * policy at any time (chrt -a). QEMU's seccomp filter permits sched_getscheduler()
 * (qemu-seccomp.c, since 4.0), but not sched_setscheduler().
 */
static bool is_realtime(const struct pace *pace)
{
	const struct sched_param none = { 0 };
	int policy = sched_getscheduler(0) & ~SCHED_RESET_ON_FORK;

	if (policy != SCHED_FIFO && policy != SCHED_RR && policy != POLICY_DEADLINE)
		return false;
	return !pace->may_set || sched_setscheduler(0, SCHED_OTHER, &none);
}

static uint64_t cpu_time(void)
{
	struct timespec used;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	return (uint64_t)used.tv_sec * 1000000000 + (uint64_t)used.tv_nsec;
}

uint64_t pf_pace_begin(struct pace *pace, bool guest_waits)
{
	uint64_t piece = 0;
	const char *why = NULL;

	pace->began = prefault_now_ns();
	if (!pace->checked_at || pace->began - pace->checked_at >= READ_EVERY) {
		pace->checked_at = pace->began;
		read_quotas(pace);
	}
	pace->share = 1;
	if (pace->quota) {
		double share = pace->quota * (guest_waits ? PART_IF_WAITING : PART);

		if (share < 1) {
			pace->share = share;
			piece = pace->quota_ns / 8;
			why = "CPU quota";
		}
	}
	if (is_realtime(pace)) {
		double share = guest_waits ? REALTIME_SHARE_IF_WAITING : REALTIME_SHARE;

		if (share < pace->share)
			pace->share = share;
		if (!piece || piece > REALTIME_PIECE)
			piece = REALTIME_PIECE;
		why = "real-time scheduling";
	}
	atomic_store(&reason, why);
	pace->cpu = cpu_time();
	if (!piece)
		return 0;
	return pace->began + (piece > LEAST_PIECE ? piece : LEAST_PIECE);
}

uint64_t pf_pace_end(const struct pace *pace)
{
	if (pace->share >= 1)
		return 0;
	return pace->began + (uint64_t)((double)(cpu_time() - pace->cpu) / pace->share);
}

const char *pf_pace_reason(void)
{
	return atomic_load(&reason);
}
