// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The prefault loop, shared by the helper and the plugin.
 *
 * The loop processes each range in chunks, with MADV_POPULATE_WRITE for a host range and
 * KVM_PRE_FAULT_MEMORY for a guest range. The helper runs inside QEMU without libc. Therefore this
 * file must not use globals, string literals, or code that a compiler can turn into a call to
 * memcpy().
 *
 * The size of a chunk is limited because KVM holds kvm->srcu during the whole ioctl
 * (virt/kvm/kvm_main.c, kvm_vcpu_pre_fault_memory()), and every memslot change waits until KVM
 * releases kvm->srcu. The loop measures time because on kernels that lack commit 20a6cff3b283
 * (v6.15) or 3ccbf6f47098 (v6.18), the ioctl can retry until the thread gets a signal.
 */
#ifndef QEMU_PREFAULT_PREFAULT_LOOP_H
#define QEMU_PREFAULT_PREFAULT_LOOP_H

#include <errno.h>
#include <stdint.h>

#include "prefault_range.h"
#include "syscall_x86_64.h"

/* Linux 6.11 uapi. Defined here because the installed kernel headers may predate Linux 6.11. */
struct kvm_pre_fault_memory_args {
	uint64_t gpa;
	uint64_t size; /* in: requested bytes; out: remaining bytes, also on error */
	uint64_t flags;
	uint64_t padding[5];
};
#define PREFAULT_IOCTL 0xC040AED5ul	/* _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory) */
#define PREFAULT_MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#define PREFAULT_CLOCK_MONOTONIC 1	/* <time.h> is not available without libc */

/*
 * Callbacks into the loop's caller. The loop calls both before each chunk. If go_on returns 0, the
 * range ends with PREFAULT_ABORTED. before_ioctl may be NULL.
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
	} now = { 0 };

	/* Use a system call, because only libc knows the address of the vDSO's clock_gettime(). */
	prefault_syscall3(__NR_clock_gettime, PREFAULT_CLOCK_MONOTONIC, (long)&now, 0);
	return (uint64_t)now.seconds * 1000000000u + (uint64_t)now.nanoseconds;
}

/*
 * Process one chunk. Returns the number of completed bytes. Sets *error to 0 or a positive errno.
 */
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
		if (hooks->before_ioctl)
			hooks->before_ioctl(hooks->context);
		uint64_t step = prefault_step(
			range, left < limits->chunk_bytes ? left : limits->chunk_bytes, vcpu_fd,
			&error);
		uint64_t now = prefault_now_ns();

		range->done += step;
		if (step)
			progress_at = now;
		/* EAGAIN: QEMU is deleting the slot (since 3ccbf6f47098, v6.18). EINTR: signal. */
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
