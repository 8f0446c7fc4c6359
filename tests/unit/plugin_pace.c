// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Work for some milliseconds at the plugin's pace. test_native_plugin_pace.py links this file with
 * the plugin's files.
 *
 * Usage: plugin_pace DIRECTORY ANCESTORS UNIFIED POLICY. DIRECTORY simulates a CPU cgroup. POLICY is
 * the scheduling policy that the thread gets before its second piece, as an operator may do.
 *
 * The program prints, for the second piece: the part of a CPU that it may use, the maximum duration
 * of the piece in seconds, the scheduling policy, and the reason.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "common/prefault_loop.h"
#include "plugin/pace.h"

static double cpu_seconds(void)
{
	struct timespec used;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct pace pace = { 0 };
	struct sched_param parameters = { 0 };

	if (argc != 5)
		return 2;
	parameters.sched_priority = sched_get_priority_min(atoi(argv[4]));
	pf_pace_use_group(open(argv[1], O_RDONLY | O_DIRECTORY), atoi(argv[2]), atoi(argv[3]));
	pf_pace_start(&pace);
	pf_pace_begin(&pace, false);
	pf_pace_end(&pace);
	if (sched_setscheduler(0, atoi(argv[4]), &parameters))
		return 77;
	double before = cpu_seconds();
	uint64_t deadline = pf_pace_begin(&pace, false);

	while (cpu_seconds() < before + 0.02)
		;
	uint64_t until = pf_pace_end(&pace);
	double cpu = cpu_seconds() - before;

	printf("%f %f %d %s\n", until ? cpu / ((double)(until - pace.began) / 1e9) : 1,
	       deadline ? (double)(deadline - pace.began) / 1e9 : 0, sched_getscheduler(0),
	       pf_pace_reason() ? pf_pace_reason() : "-");
	return 0;
}
