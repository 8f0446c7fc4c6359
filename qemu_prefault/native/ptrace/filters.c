// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "filters.h"

#include <errno.h>
#include <linux/filter.h>
#include <string.h>
#include <sys/ptrace.h>

#include "tracee.h"

#define SECCOMP_GET_FILTER 0x420c /* include/uapi/linux/ptrace.h: PTRACE_SECCOMP_GET_FILTER */

int64_t pf_read_filters(const struct pf_target *target, int32_t tid, void *buffer, uint64_t size,
			struct inject_result *result)
{
	char *to = buffer;
	uint64_t used = 0;
	int failed = 0;

	*result = (struct inject_result){ 0 };
	if (pf_seize(target, tid, result))
		return -1;
	for (unsigned long index = 0; !failed; index++) {
		long count = ptrace(SECCOMP_GET_FILTER, tid, (void *)index, NULL);
		uint32_t length = (uint32_t)count;

		if (count < 0 && errno == ENOENT)
			break; /* index is the number of filters */
		if (count < 0)
			failed = pf_fail(result, INJECT_FILTERS, errno);
		else if (used + sizeof(length) + length * sizeof(struct sock_filter) > size)
			failed = pf_fail(result, INJECT_FILTERS, E2BIG);
		else if (ptrace(SECCOMP_GET_FILTER, tid, (void *)index,
				to + used + sizeof(length)) < 0)
			failed = pf_fail(result, INJECT_FILTERS, errno);
		if (failed)
			break;
		memcpy(to + used, &length, sizeof(length));
		used += sizeof(length) + length * sizeof(struct sock_filter);
	}
	pf_release(tid);
	return failed ? -1 : (int64_t)used;
}
