// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The one prefault loop, shared by the helper and the plugin.
 *
 * It is handed a batch of ranges and works through them in bounded chunks:
 * MADV_POPULATE_WRITE for a host range, KVM_PRE_FAULT_MEMORY for a guest range.
 * It runs inside QEMU, without libc, so the file is freestanding: no globals,
 * no string literals, no calls that a compiler could turn into memcpy().
 *
 * Why chunks: KVM holds kvm->srcu for the whole ioctl (virt/kvm/kvm_main.c,
 * kvm_vcpu_pre_fault_memory()), so every memslot change waits for it.
 * Why a clock: on kernels without commits 20a6cff3b283 (v6.15) and 3ccbf6f47098
 * (v6.18) the ioctl can retry for ever, and only a signal gets it out.
 */
#ifndef QEMU_PREFAULT_PREFAULT_LOOP_H
#define QEMU_PREFAULT_PREFAULT_LOOP_H

#include <errno.h>
#include <stdint.h>

#include "prefault_range.h"
#include "syscall_x86_64.h"

/* Linux 6.11 uapi; spelt out because a distribution's headers may be older. */
struct kvm_pre_fault_memory_args {
	uint64_t gpa;
	uint64_t size; /* in: bytes wanted; out: bytes left, also on errors */
	uint64_t flags;
	uint64_t padding[5];
};
#define PREFAULT_IOCTL 0xC040AED5ul	/* _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory) */
#define PREFAULT_MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#define PREFAULT_CLOCK_MONOTONIC 1	/* <time.h> is libc's */

/*
 * What the loop needs of its surroundings. Both run between chunks.
 * go_on: 0 ends the batch. before_ioctl: re-arm whatever interrupts a stuck ioctl.
 */
struct prefault_hooks {
	int (*go_on)(void *context);
	void (*before_ioctl)(void *context);
	void *context;
};

static inline uint64_t prefault_now_ns(void)
{
	struct {
		int64_t seconds, nanoseconds;
	} now;

	/* clock_gettime(CLOCK_MONOTONIC) by system call: there is no vDSO without libc. */
	prefault_syscall3(__NR_clock_gettime, PREFAULT_CLOCK_MONOTONIC, (long)&now, 0);
	return (uint64_t)now.seconds * 1000000000u + (uint64_t)now.nanoseconds;
}

/* One bounded step. Returns bytes done; *error is 0 or a positive errno. */
static inline uint64_t prefault_step(const struct prefault_range *range, uint64_t bytes,
				     int vcpu_fd, int *error)
{
	uint64_t start = range->start + range->done;
	long result;

	if (range->kind == PREFAULT_POPULATE) {
		result = prefault_syscall3(__NR_madvise, (long)start, (long)bytes,
					   PREFAULT_MADV_POPULATE_WRITE);
		*error = (int)-result;
		return result == 0 ? bytes : 0;
	}
	struct kvm_pre_fault_memory_args args = { .gpa = start, .size = bytes };

	result = prefault_syscall3(__NR_ioctl, vcpu_fd, (long)PREFAULT_IOCTL, (long)&args);
	*error = (int)-result;
	return bytes - args.size;
}

static inline void prefault_run_range(struct prefault_range *range, int vcpu_fd,
				      const struct prefault_limits *limits,
				      const struct prefault_hooks *hooks)
{
	uint64_t progress_at = prefault_now_ns();

	while (range->done < range->size) {
		uint64_t left = range->size - range->done;
		int error;

		if (!hooks->go_on(hooks->context)) {
			range->error = PREFAULT_ABORTED;
			return;
		}
		hooks->before_ioctl(hooks->context);
		uint64_t step = prefault_step(
			range, left < limits->chunk_bytes ? left : limits->chunk_bytes, vcpu_fd,
			&error);
		uint64_t now = prefault_now_ns();

		range->done += step;
		if (step)
			progress_at = now;
		/* A signal, or (since 3ccbf6f47098) a slot that is being deleted. */
		if (error == EINTR || error == EAGAIN) {
			if (now - progress_at < limits->stuck_ns)
				continue;
			error = PREFAULT_STUCK;
		}
		if (error) {
			range->error = error;
			return;
		}
	}
}

#endif
