// SPDX-License-Identifier: GPL-2.0-or-later
#include "limits.h"

#include <unistd.h>

#include "os.h"

static struct limits_files files = { .proc = -1, .pids = -1 };

void pf_limits_open(void)
{
	pf_limits_close(); /* after a fork, these are the parent's cgroups */
	pf_limits_find("/proc", "/proc/self/cgroup", "/proc/self/mountinfo", &files);
	files.locks_memory = pf_argument_contains("mem-lock=") &&
			     !pf_argument_contains("mem-lock=off");
}

void pf_limits_close(void)
{
	if (files.proc >= 0)
		close(files.proc);
	if (files.pids >= 0)
		close(files.pids);
	files.proc = files.pids = -1;
}

bool pf_limits_allow(const struct limits_need *need, char clause[PF_CLAUSE])
{
	return pf_limits_check(&files, need, clause, PF_CLAUSE);
}
